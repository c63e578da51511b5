"""What each model class puts before and after its visual tokens.

ComfyUI's models lay out their tokens in their own ways, and few say how. All of them share a latent, whose shape is
known where the sampler calls the model. The rule of the model class turns it into an `Expectation`. A wrong grid costs
sparsity and nothing else: it only decides which tokens share a block.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .token_layout import KEY, Expectation, Grid, grid_of


@dataclass(frozen=True)
class ModelCall:
    """One evaluation of a diffusion model, as its rule sees it.

    latent: (T, H, W) of the latent, T = 1 for an image.
    text: tokens of the text condition.
    conds: the other conditions by name.
    """

    model: Any
    latent: Grid
    text: int
    conds: dict[str, Any]

    @property
    def patch(self) -> Grid:
        return _patch_size(self.model)

    @property
    def grid(self) -> Grid:
        """The latent in patches, the last ones padded."""
        return _patches(self.latent, self.patch)

    def tokens_of(self, side: str) -> int | None:
        """Tokens of what a rule names, None for REST."""
        if side == REST:
            return None
        if side == TEXT:
            return self.text
        if side == PADDING:
            return -math.prod(self.grid) % (getattr(self.model, "pad_tokens_multiple", None) or 1)
        latents = self.conds.get(side)
        if latents is None:
            return 0
        latents = [latents] if isinstance(latents, Tensor) else latents
        return sum(math.prod(_patches(grid_of(latent.shape[2:]), self.patch)) for latent in latents)


NOTHING, TEXT, REST, PADDING = "nothing", "the text", "the rest", "padding"


@dataclass(frozen=True)
class Sides:
    """A rule as data: what stands on either side of the grid.

    before, after: NOTHING, TEXT, the name of a condition that holds latents (B, C, …, H, W), PADDING of the grid to a
        multiple, or REST: all else that a call has.
    with_text: REST is nothing in some layers, and holds at least the text in the others.
    """

    before: str = NOTHING
    after: str = NOTHING
    with_text: bool = False

    def __call__(self, call: ModelCall) -> Expectation:
        return Expectation(call.grid, call.tokens_of(self.before), call.tokens_of(self.after),
                           least=call.text if self.with_text else 0)


def _wan(call: ModelCall) -> Expectation:
    """A reference frame where the model has weights for it, the grid, and clips given as context."""
    frames, height, width = call.grid
    extra = call.conds.get("time_dim_concat")
    if extra is not None:
        frames += math.ceil(extra.shape[2] / call.patch[0])
    reference = NOTHING if getattr(call.model, "ref_conv", None) is None else "reference_latent"
    return Expectation((frames, height, width), call.tokens_of(reference), call.tokens_of("context_latents"))


def _ltx(call: ModelCall) -> Expectation:
    """The last frames of the latent are guides. Calls with fewer tokens leave out some; only the model knows which."""
    guides = call.conds.get("keyframe_idxs")  # (B, 3, tokens, …)
    frames, height, width = call.grid
    count = 0 if guides is None else guides.shape[2]
    if count % (height * width) or count >= math.prod(call.grid):
        return Expectation(call.grid)
    return Expectation((frames - count // (height * width), height, width), after=count)


def _hidream(call: ModelCall) -> Expectation:
    """The grid with the image to edit on its right, then text."""
    image = call.conds.get("image_cond")
    if image is not None:
        frames, height, width = call.latent
        call = replace(call, latent=(frames, height, width + image.shape[-1]))
    return Expectation(call.grid, after=None, least=call.text)


def _minimax(call: ModelCall) -> Expectation:
    """[text | key frames | references | audio | video]. The sound is generated with the video and takes few of the
    tokens, text and pictures are what the video has to follow: all of these stay exact. A reference clip may be as long
    as the video and goes sparse like it; its keys are attended by all.
    """
    payload = call.conds.get("minimax_payload") or {}
    visual = [latent.shape[2] for latent in payload.get("cond_video_latents") or ()]  # frames of each, in their order
    segments = getattr(payload.get("layout"), "segments", ())
    pictures_and_clips = [(start, stop) for start, stop, kind in segments if kind in ("cond", "ref_img")]
    clips = tuple(span for span, frames in zip(pictures_and_clips, visual) if frames > 1)
    return Expectation(call.grid, before=None, least=call.text, exact=True, clips=clips)


def _unet(call: ModelCall) -> Expectation:
    """Each level has a grid of its own, which it tells."""
    return Expectation(None)


# Each rule with the model classes that it serves.
_RULES: dict[str, Callable[[ModelCall], Expectation]] = {name: rule for rule, names in (
    # Wan; Animate 2 attends frame by frame and has no rule.
    (_wan, "WanModel VaceWanModel CameraWanModel AnimateWanModel WanDancerModel CausalWanModel"),
    (Sides(after=REST), "HumoWanModel WanModel_S2V"),
    (Sides(before="reference_latent", after=REST), "SCAILWanModel SCAIL2WanModel"),  # a pose clip of its own size
    # other video models
    (Sides(before=REST, with_text=True), "HunyuanVideo CogVideoXTransformer3DModel"),
    (_minimax, "MiniMaxH3Model"),
    (Sides(after=REST), "AsymmDiTJoint"),
    (Sides(), "GeneralDIT MiniTrainDIT Anima Kandinsky5"),
    (_ltx, "LTXVModel LTXAVModel"),
    # image models
    (Sides(before=TEXT, after="ref_latents"), "Flux Chroma ChromaRadiance QwenImageTransformer2DModel"),
    (Sides(before=REST, with_text=True), "OpenAISignatureMMDITWrapper MMDiT OmniGen2Transformer2DModel"),
    (Sides(before=REST, after=PADDING, with_text=True), "NextDiT NextDiTPixelSpace"),  # Lumina and Z-Image
    (_hidream, "HiDreamImageTransformer2DModel"),
    (_unet, "UNetModel"),
) for name in names.split()}


def expect_tokens(executor, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
                  control: dict | None = None, transformer_options: dict | None = None, **conds):
    """An APPLY_MODEL wrapper: leaves the expectation, or why there is none, in transformer_options."""
    try:
        expected = expectation(executor.class_obj.diffusion_model, x.shape, c_crossattn, conds)
    except Exception as problem:  # a node may put anything into conditions, and a hint must not end their run
        expected = f"conditions that the rule for this model does not understand ({problem})"
    options = {**(transformer_options or {}), KEY: expected}
    return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def expectation(model: Any, shape: torch.Size, text: Tensor | None, conds: dict[str, Any]) -> Expectation | str:
    """What to expect of a model's attention calls, or why nothing is known.

    shape: of the latent, (B, C, H, W) or (B, C, T, H, W), or packed with its own shape in `conds`.
    text: (B, tokens, …).
    """
    name = type(getattr(model, "_orig_mod", model)).__name__  # torch.compile wraps models
    rule = _RULES.get(name)
    if rule is None:
        return f"nothing is known about the token order of the model class {name}"
    packed = conds.get("latent_shapes")
    if packed is not None and len(packed) > 1:
        shape = packed[0]  # video, then audio
    latent = grid_of(shape[2:])
    if latent is None:
        return f"a latent of shape {tuple(shape)} has no grid"
    tokens = text.shape[1] if isinstance(text, Tensor) and text.ndim > 1 else 0
    return replace(rule(ModelCall(model, latent, tokens, conds)), text=tokens)


def _patches(latent: Grid | None, patch: Grid) -> Grid:
    if latent is None:
        raise ValueError("a latent has no grid")
    frames, height, width = (math.ceil(size / edge) for size, edge in zip(latent, patch))
    return frames, height, width


def _patch_size(model: Any) -> Grid:
    """(T, H, W) of a model's patches, which each model spells in its own way."""
    space = getattr(model, "patch_spatial", None) or getattr(model, "patch_size", 1)
    if not isinstance(space, int):
        return grid_of(space) or (1, 1, *space)
    time = getattr(model, "patch_temporal", None) or getattr(model, "patch_size_t", None) or 1
    return time, space, space

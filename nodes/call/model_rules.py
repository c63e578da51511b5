"""Where each model keeps its visual tokens: the grid of a sequence, and how many other tokens lie on either side of it.

ComfyUI's models lay their tokens out in their own ways and few tell how. What all of them share is a latent, whose
shape is seen where the sampler calls the model. One rule for each model class turns it into an `Expectation`, and the
token count of an attention call then confirms or refutes that. A grid that is wrong all the same costs sparsity and
nothing else: it only decides which tokens share a block.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...hilbert import sequence_order

Grid = tuple[int, int, int]
UNSEEN = "the model was called in a way that hides its latent"
KEY = "spargeattn_expectation"  # in transformer_options, from `expect_tokens` to the attention calls


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `before` other tokens, the tokens of a (T, H, W) grid row by row, and `after` other tokens.

    The others are text, references and padding.
    """

    grid: Grid
    before: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        return self.before + math.prod(self.grid) + self.after

    @property
    def others(self) -> tuple[tuple[int, int], ...]:
        """Ranges (start, stop) of the tokens outside the grid.

        As sink keys they are always attended, in whole blocks, so that a block which mixes both kinds misleads no
        query. As queries they are left to the similarity judge, where the selection has one: it finds the blocks that
        their mean does not describe, and the others may skip visual blocks like any query.
        """
        ranges = (0, self.before), (self.tokens - self.after, self.tokens)
        return tuple(span for span in ranges if span[0] < span[1])

    def order(self, curve: str, device: torch.device) -> Tensor:
        """The order that blocks follow, int32 (tokens,): the grid along `curve`, from the first block on; then others.

        With the grid first, its boxes fill blocks exactly, however many tokens lie before it in the model.
        """
        return sequence_order(self.grid, before=self.before, after=self.after, curve=curve, device=device)

    def __str__(self) -> str:
        parts = self.before, "×".join(map(str, self.grid)), self.after
        return " + ".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class Expectation:
    """What the attention calls of one evaluation of a model should look like.

    grid: None where the model tells it at each call. before, after: tokens on either side, at most one of them None,
    for whatever a call has beyond the rest: nothing, or at least `least` tokens. text: tokens of the text condition;
    a call over just as many may be a text encoder's.
    """

    grid: Grid | None
    before: int | None = 0
    after: int | None = 0
    least: int = 0
    text: int = 0

    def layout(self, tokens: int, transformer_options: dict[str, Any]) -> TokenLayout | str:
        """The layout of a call over `tokens` tokens, or why it is not certain."""
        grid = self.grid or _three((transformer_options.get("activations_shape") or ())[2:])
        if grid is None:
            return "the model does not tell the shape of this layer"
        known = TokenLayout(grid, self.before or 0, self.after or 0)
        remaining = tokens - known.tokens
        open_ended = self.before is None or self.after is None
        if remaining < 0 or 0 < remaining < self.least or (remaining and not open_ended):
            return f"{tokens} tokens do not fit {known} with {self.text} of text"
        if tokens == self.text:
            return f"{tokens} tokens fit {known}, and the text as well"
        if self.before is None:
            return replace(known, before=remaining)
        return replace(known, after=known.after + remaining)


@dataclass(frozen=True)
class ModelCall:
    """One evaluation of a diffusion model, as its rule sees it.

    latent: (T, H, W) of the latent, T = 1 for an image. text: tokens of the text condition. conds: the other conditions
    by name.
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

    def tokens_of(self, name: str) -> int:
        """Tokens of the latents, (B, C, …, H, W) each, that the model takes as the condition `name`."""
        latents = self.conds.get(name)
        if latents is None:
            return 0
        latents = [latents] if isinstance(latents, Tensor) else latents
        return sum(math.prod(_patches(_three(latent.shape[2:]), self.patch)) for latent in latents)


Rule = Callable[[ModelCall], Expectation]


def _grid_alone(call: ModelCall) -> Expectation:
    return Expectation(call.grid)


def _grid_last(call: ModelCall) -> Expectation:
    """Text and whatever else the model was given, then the grid; some layers see the grid alone."""
    return Expectation(call.grid, before=None, least=call.text)


def _grid_first(call: ModelCall) -> Expectation:
    """The grid, then text, references, or sketches of earlier frames."""
    return Expectation(call.grid, after=None)


def _text_first(call: ModelCall) -> Expectation:
    """Text, the grid, and the grids of reference images."""
    return Expectation(call.grid, before=call.text, after=call.tokens_of("ref_latents"))


def _grid_per_call(call: ModelCall) -> Expectation:
    return Expectation(None)


def _wan(call: ModelCall) -> Expectation:
    """A reference frame where the model has weights for it, the grid, and clips given as context."""
    frames, height, width = call.grid
    extra = call.conds.get("time_dim_concat")
    if extra is not None:
        frames += math.ceil(extra.shape[2] / call.patch[0])
    has_reference = getattr(call.model, "ref_conv", None) is not None
    return Expectation((frames, height, width), before=call.tokens_of("reference_latent") if has_reference else 0,
                       after=call.tokens_of("context_latents"))


def _wan_scail(call: ModelCall) -> Expectation:
    """Reference frames, the grid, and a pose clip of its own size."""
    return Expectation(call.grid, before=call.tokens_of("reference_latent"), after=None)


def _ltx(call: ModelCall) -> Expectation:
    """Guides are the last frames of the latent. A call with fewer tokens masks some out: which, the model keeps."""
    guides = call.conds.get("keyframe_idxs")  # (B, 3, tokens, …)
    frames, height, width = call.grid
    count = 0 if guides is None else guides.shape[2]
    if count % (height * width) or count >= math.prod(call.grid):
        return Expectation(call.grid)
    return Expectation((frames - count // (height * width), height, width), after=count)


def _lumina(call: ModelCall) -> Expectation:
    """Captions and references, then the grid, which Z-Image pads to a multiple."""
    multiple = getattr(call.model, "pad_tokens_multiple", None) or 1
    return Expectation(call.grid, before=None, after=-math.prod(call.grid) % multiple, least=call.text)


def _hidream(call: ModelCall) -> Expectation:
    """The grid, to the right of which the image to edit stands, then text."""
    frames, height, width = call.grid
    image = call.conds.get("image_cond")
    if image is not None:
        width = math.ceil((call.latent[2] + image.shape[-1]) / call.patch[2])
    return Expectation((frames, height, width), after=None, least=call.text)


_RULES: dict[str, Rule] = {
    # Wan; Animate 2 attends frame by frame and has none.
    "WanModel": _wan, "VaceWanModel": _wan, "CameraWanModel": _wan, "AnimateWanModel": _wan, "WanDancerModel": _wan,
    "CausalWanModel": _wan, "HumoWanModel": _grid_first, "WanModel_S2V": _grid_first,
    "SCAILWanModel": _wan_scail, "SCAIL2WanModel": _wan_scail,
    # other video models
    "HunyuanVideo": _grid_last, "AsymmDiTJoint": _grid_first, "CogVideoXTransformer3DModel": _grid_last,
    "LTXVModel": _ltx, "LTXAVModel": _ltx, "GeneralDIT": _grid_alone, "MiniTrainDIT": _grid_alone,
    "Anima": _grid_alone, "Kandinsky5": _grid_alone, "MiniMaxH3Model": _grid_last,
    # image models
    "Flux": _text_first, "Chroma": _text_first, "ChromaRadiance": _text_first,
    "QwenImageTransformer2DModel": _text_first,
    "OpenAISignatureMMDITWrapper": _grid_last, "MMDiT": _grid_last,  # SD3, AuraFlow
    "NextDiT": _lumina, "NextDiTPixelSpace": _lumina, "OmniGen2Transformer2DModel": _grid_last,
    "HiDreamImageTransformer2DModel": _hidream, "UNetModel": _grid_per_call,
}


def token_layout(tokens: int, transformer_options: dict[str, Any]) -> TokenLayout | str:
    """The layout of an attention call over `tokens` tokens, or why it is not certain."""
    expectation = transformer_options.get(KEY, UNSEEN)
    try:
        return expectation if isinstance(expectation, str) else expectation.layout(tokens, transformer_options)
    except Exception as problem:  # what a model says of its call may be anything; a hint must not end its run
        return f"options that the rule for this model does not understand ({problem})"


def expect_tokens(executor, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
                  control: dict | None = None, transformer_options: dict | None = None, **conds):
    """An APPLY_MODEL wrapper: leaves the expectation, or why there is none, in transformer_options."""
    try:
        expected = expectation(executor.class_obj.diffusion_model, x.shape, c_crossattn, conds)
    except Exception as problem:  # conditions may be anything that a node made; a hint must not end their run
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
    latent = _three(shape[2:])
    if latent is None:
        return f"a latent of shape {tuple(shape)} has no grid"
    length = text.shape[1] if isinstance(text, Tensor) and text.ndim > 1 else 0
    call = ModelCall(model, latent, length, conds)
    return replace(rule(call), text=length)


def _three(sizes) -> Grid | None:
    """(T, H, W) of two or three sizes; None for any other number."""
    sizes = tuple(map(int, sizes))
    return {2: (1, *sizes), 3: sizes}.get(len(sizes))


def _patches(latent: Grid, patch: Grid) -> Grid:
    return tuple(math.ceil(n / p) for n, p in zip(latent, patch))


def _patch_size(model: Any) -> Grid:
    """(T, H, W) of a model's patches, which each model spells in its own way."""
    space = getattr(model, "patch_spatial", None) or getattr(model, "patch_size", 1)
    if not isinstance(space, int):
        return (1,) * (3 - len(space)) + tuple(space)
    time = getattr(model, "patch_temporal", None) or getattr(model, "patch_size_t", None) or 1
    return time, space, space

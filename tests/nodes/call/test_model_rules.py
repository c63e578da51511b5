"""Rules that find the visual tokens of a sequence: from shapes and conditions alone, without ComfyUI."""
import math
from types import SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.model_rules import _RULES, expect_tokens, expectation
from comfyui_spargeattn.nodes.call.plan import HILBERT_CHOICES, NodeSettings, plan_call
from comfyui_spargeattn.nodes.call.token_layout import KEY, UNSEEN, TokenLayout, token_layout


def model(name, **attributes):
    return type(name, (), attributes)()


def layout(diffusion_model, latent, tokens, text=0, options=None, **conds):
    """What a call over `tokens` tokens is taken for."""
    expected = expectation(diffusion_model, torch.Size(latent), torch.zeros(1, text, 8), conds)
    return token_layout(tokens, {KEY: expected, **(options or {})})


def latents(*shape):
    return torch.zeros(shape, device="meta")


WAN = model("WanModel", patch_size=(1, 2, 2), ref_conv=None)
WAN_WITH_REFERENCE = model("WanModel", patch_size=(1, 2, 2), ref_conv=object())
HUNYUAN = model("HunyuanVideo", patch_size=[1, 2, 2])
HUNYUAN_IMAGE = model("HunyuanVideo", patch_size=[1, 1])
MOCHI = model("AsymmDiTJoint", patch_size=2)
LTX = model("LTXVModel")
COG = model("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=None)
COG_1_5 = model("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=2)
COSMOS = model("MiniTrainDIT", patch_spatial=2, patch_temporal=1)
KANDINSKY = model("Kandinsky5", patch_size=(1, 2, 2))
MINIMAX = model("MiniMaxH3Model", patch_size=(1, 2, 2))
# A picture, a clip in the place of the first frames, another picture, a reference clip with its sound.
H3_REFERENCES = {"layout": SimpleNamespace(segments=[
    (0, 512, "text"), (512, 612, "cond"), (612, 812, "cond"), (812, 912, "ref_img"), (912, 1000, "ref_audio"),
    (1000, 1800, "ref_img"), (1800, 2000, "audio"), (2000, 5120, "video")]),
    "cond_video_latents": [latents(1, 24, frames, 20, 20) for frames in (1, 2, 1, 8)]}
FLUX = model("Flux", patch_size=2)
QWEN = model("QwenImageTransformer2DModel", patch_size=2)
SD3 = model("OpenAISignatureMMDITWrapper", patch_size=2)
LUMINA = model("NextDiT", patch_size=2, pad_tokens_multiple=None)
Z_IMAGE = model("NextDiT", patch_size=2, pad_tokens_multiple=32)
HIDREAM = model("HiDreamImageTransformer2DModel", patch_size=2)
SCAIL = model("SCAILWanModel", patch_size=(1, 2, 2), ref_conv=None)
UNET = model("UNetModel")


@pytest.mark.parametrize("found, expected", (
    # video
    (layout(WAN, (1, 16, 21, 60, 104), 32760, 512), TokenLayout((21, 30, 52))),
    (layout(WAN, (1, 16, 21, 59, 103), 32760, 512), TokenLayout((21, 30, 52))),
    (layout(WAN, (2, 16, 20, 60, 104), 32760, 512, time_dim_concat=latents(2, 16, 1, 60, 104)),
     TokenLayout((21, 30, 52))),
    (layout(WAN, (1, 16, 2, 60, 104), 3120 + 180, 512, context_latents=[latents(1, 16, 2, 17, 20)]),
     TokenLayout((2, 30, 52), after=180)),
    (layout(WAN_WITH_REFERENCE, (1, 16, 2, 60, 104), 1560 + 3120, 512, reference_latent=latents(1, 16, 60, 104)),
     TokenLayout((2, 30, 52), before=1560)),
    (layout(WAN, (1, 16, 2, 60, 104), 3120, 512, reference_latent=latents(1, 16, 60, 104)), TokenLayout((2, 30, 52))),
    (layout(SCAIL, (1, 16, 2, 60, 104), 1560 + 3120 + 780, 512, reference_latent=latents(1, 16, 1, 60, 104)),
     TokenLayout((2, 30, 52), 1560, 780)),
    (layout(HUNYUAN, (1, 16, 33, 90, 160), 118800 + 300, 256), TokenLayout((33, 45, 80), before=300)),
    (layout(HUNYUAN_IMAGE, (1, 64, 64, 64), 4096 + 300, 256), TokenLayout((1, 64, 64), before=300)),
    (layout(MOCHI, (1, 12, 28, 60, 106), 44520 + 60, 256), TokenLayout((28, 30, 53), after=60)),
    (layout(LTX, (1, 128, 13, 16, 24), 4992, 128), TokenLayout((13, 16, 24))),
    (layout(LTX, (1, 128, 15, 16, 24), 5760, 128, keyframe_idxs=latents(1, 3, 768)),
     TokenLayout((13, 16, 24), after=768)),
    (layout(model("LTXAVModel"), (1, 1, 999), 4992, 128, latent_shapes=[(1, 128, 13, 16, 24), (1, 8, 60, 16)]),
     TokenLayout((13, 16, 24))),
    (layout(COG, (1, 16, 13, 60, 90), 226 + 17550, 226), TokenLayout((13, 30, 45), before=226)),
    (layout(COG_1_5, (1, 16, 11, 96, 170), 226 + 24480, 226), TokenLayout((6, 48, 85), before=226)),
    (layout(COSMOS, (1, 16, 16, 88, 160), 56320, 512), TokenLayout((16, 44, 80))),
    (layout(KANDINSKY, (1, 16, 64, 96), 1536, 256), TokenLayout((1, 32, 48))),
    (layout(MINIMAX, (1, 1, 999), 700 + 3120, 512, latent_shapes=[(1, 24, 2, 60, 104), (1, 32, 2, 94)]),
     TokenLayout((2, 30, 52), before=700, exact=((0, 700),))),
    (layout(MINIMAX, (1, 1, 999), 2000 + 3120, 512, latent_shapes=[(1, 24, 2, 60, 104), (1, 32, 2, 94)],
            minimax_payload=H3_REFERENCES),
     TokenLayout((2, 30, 52), before=2000, exact=((0, 612), (812, 1000), (1800, 2000)))),
    (layout(model("GeneralDIT", patch_spatial=2, patch_temporal=2), (1, 16, 5, 62, 90), 3 * 31 * 45, 77),
     TokenLayout((3, 31, 45))),
    (layout(model("WanModel", patch_size=(2, 2, 2), ref_conv=None), (1, 16, 3, 60, 104), 4 * 30 * 52, 512,
            time_dim_concat=latents(1, 16, 3, 60, 104)), TokenLayout((4, 30, 52))),
    # images
    (layout(FLUX, (1, 16, 128, 128), 4608, 512), TokenLayout((1, 64, 64), before=512)),
    (layout(FLUX, (1, 16, 128, 127), 512 + 4096 + 160, 512, ref_latents=[latents(1, 16, 20, 31)]),
     TokenLayout((1, 64, 64), 512, 160)),
    (layout(QWEN, (1, 16, 1, 166, 166), 100 + 6889 + 320, 100, ref_latents=[latents(1, 16, 1, 20, 31)] * 2),
     TokenLayout((1, 83, 83), 100, 320)),
    (layout(SD3, (1, 16, 128, 128), 4250, 154), TokenLayout((1, 64, 64), before=154)),
    (layout(SD3, (1, 16, 128, 128), 4096, 154), TokenLayout((1, 64, 64))),
    (layout(model("MMDiT", patch_size=2), (1, 4, 128, 128), 4096 + 264, 256), TokenLayout((1, 64, 64), before=264)),
    (layout(LUMINA, (1, 16, 128, 128), 4096 + 77, 77), TokenLayout((1, 64, 64), before=77)),
    (layout(Z_IMAGE, (1, 16, 94, 102), 64 + 2400, 40), TokenLayout((1, 47, 51), 64, 3)),
    (layout(HIDREAM, (1, 16, 128, 128), 4096 + 384, 128), TokenLayout((1, 64, 64), after=384)),
    (layout(HIDREAM, (1, 16, 96, 80), 48 * 72 + 384, 128, image_cond=latents(1, 16, 96, 64)),
     TokenLayout((1, 48, 72), after=384)),
    (layout(UNET, (2, 4, 128, 128), 4096, 77, {"activations_shape": [2, 640, 64, 64]}), TokenLayout((1, 64, 64))),
    (layout(UNET, (2, 4, 104, 152), 988, 77, {"activations_shape": [2, 1280, 26, 38]}), TokenLayout((1, 26, 38))),
))
def test_layouts(found, expected):
    assert found == expected


@pytest.mark.parametrize("found, reason", (
    (layout(WAN, (1, 16, 21, 60, 104), 32761, 512), "32761 tokens do not fit 21×30×52 with 512 of text"),
    (layout(WAN, (1, 16, 21, 60, 104), 512, 512), "512 tokens do not fit 21×30×52"),
    (layout(WAN, (1, 16, 1, 32, 64), 512, 512), "512 tokens fit 1×16×32, and the text as well"),
    (layout(HUNYUAN, (1, 16, 33, 90, 160), 118800 + 255, 256), "119055 tokens do not fit 33×45×80 with 256 of text"),
    (layout(LTX, (1, 128, 15, 16, 24), 5600, 128, keyframe_idxs=latents(1, 3, 768)),
     "5600 tokens do not fit 13×16×24 + 768"),
    (layout(LTX, (1, 128, 15, 16, 24), 5600, 128, keyframe_idxs=latents(1, 3, 700)), "5600 tokens do not fit 15×16×24"),
    (layout(FLUX, (1, 16, 128, 128), 4609, 512), "4609 tokens do not fit 512 + 1×64×64"),
    (layout(KANDINSKY, (1, 16, 64, 96), 1537, 256), "1537 tokens do not fit 1×32×48"),
    (layout(UNET, (2, 4, 128, 128), 4096, 77), "the model does not tell the shape of this layer"),
    (layout(UNET, (2, 4, 128, 128), 4000, 77, {"activations_shape": [2, 640, 64, 64]}),
     "4000 tokens do not fit 1×64×64"),
    (layout(model("AudioDiffusionTransformer"), (1, 64, 1024), 1024),
     "nothing is known about the token order of the model class AudioDiffusionTransformer"),
    (layout(FLUX, (1, 64, 1024), 1024), "a latent of shape (1, 64, 1024) has no grid"),
    (token_layout(4096, {}), UNSEEN),
))
def test_no_layout_without_certainty(found, reason):
    assert isinstance(found, str) and found.startswith(reason)


def test_rules_give_layouts_of_exactly_the_calls_length():
    """Whatever the length of a call, a layout that is given fits it: its order can't be of another length."""
    for name in _RULES:
        some = model(name, patch_size=2)
        found = [layout(some, (1, 16, 2, 8, 12), tokens, 7, {"activations_shape": (1, 8, 6, 8)})
                 for tokens in range(1, 120)]
        fits = [item for item in found if not isinstance(item, str)]
        assert fits, name
        for tokens, item in enumerate(found, 1):
            assert isinstance(item, str) or item.tokens == tokens == item.order("hilbert", torch.device("cpu")).numel()


def test_wrapper_leaves_the_callers_options_alone():
    def executor(*args, **kwargs):
        seen.append((args, kwargs))
        return "result"

    seen = []
    executor.class_obj = SimpleNamespace(diffusion_model=FLUX)
    x, text, options = torch.zeros(1, 16, 32, 32), torch.zeros(1, 10, 4), {"sigmas": None}
    assert expect_tokens(executor, x, 0.5, None, text, None, options, ref_latents=[x]) == "result"
    [((*args, handed_on), kwargs)] = seen
    assert args == [x, 0.5, None, text, None] and kwargs == {"ref_latents": [x]} and options == {"sigmas": None}
    assert token_layout(10 + 256 + 256, handed_on) == TokenLayout((1, 16, 16), 10, 256)


@pytest.mark.parametrize("diffusion_model, conds", (
    (MINIMAX, {"minimax_payload": {"layout": SimpleNamespace(segments=5), "cond_video_latents": [3]}}),
    (FLUX, {"ref_latents": "none"}), (HIDREAM, {"image_cond": 3}), (WAN, {"context_latents": [torch.zeros(3)]}),
    (model("Flux", patch_size="large"), {}), (None, {"latent_shapes": 5}),
))
def test_conditions_that_no_rule_understands(diffusion_model, conds):
    """A hint never ends a run."""
    executor = Executor(diffusion_model)
    expect_tokens(executor, torch.zeros(1, 16, 32, 32), 0.5, None, torch.zeros(1, 10, 4), None, None, **conds)
    [handed_on] = executor.options
    assert isinstance(token_layout(266, handed_on), str)


class Executor:
    """Of an APPLY_MODEL wrapper; keeps the transformer_options that it is called with."""

    def __init__(self, diffusion_model):
        self.class_obj = SimpleNamespace(diffusion_model=diffusion_model)
        self.options = []

    def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **conds):
        self.options.append(transformer_options)


def test_models_wrapped_by_torch_compile():
    compiled = model("OptimizedModule", _orig_mod=FLUX, patch_size=2)
    assert layout(compiled, (1, 16, 32, 32), 266, 10) == TokenLayout((1, 16, 16), 10)


@pytest.mark.parametrize("hilbert", HILBERT_CHOICES)
def test_plans(hilbert):
    """The widget decides the order; tokens outside a reordered grid are sinks."""
    q = torch.zeros(1, 1, 266, 8)
    options = {KEY: expectation(FLUX, torch.Size((1, 16, 32, 32)), torch.zeros(1, 10, 8), {})}
    settings = NodeSettings(SpargeParams(), min_tokens=64, hilbert=hilbert)
    plan = plan_call(AttentionCall(q, q, q, "BHND", transformer_options=options), settings)
    assert plan.exact_tokens["sink_keys"] == (() if plan.order is None else ((0, 10),))
    assert plan.layout == TokenLayout((1, 16, 16), 10)
    assert (plan.order is None) == (HILBERT_CHOICES[hilbert] is None)
    if plan.order is not None:
        assert plan.order.shape == (266,) and math.prod(plan.layout.grid) == 256
    plan = plan_call(AttentionCall(q, q, q, "BHND"), settings)
    assert plan.order is None and plan.exact_tokens["sink_keys"] == ()

"""Every launch configuration of this GPU with every switch, in bf16; tests/kernels/_triton has other dtypes, dims."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv, video_qkv
from comfyui_spargeattn.tests.gpu.device import needs_gpu
from comfyui_spargeattn.tests.kernels._triton.harness import PV_FORMATS, check_call

pytestmark = needs_gpu
N = 1500
SWITCHES = {
    "plain": (dict(cdf_threshold=0.6), {}),
    "causal": (dict(topk=0.3), dict(causal=True)),
    "pooled": (dict(topk=0.3), dict(skipped="pooled")),
    "lambda": (dict(cdf_threshold=0.8, pv_threshold=1.5), {}),
    "causal lambda padding": (dict(cdf_threshold=0.8, pv_threshold=1.5), dict(causal=True, padded=True)),
    "causal lambda pooled": (dict(topk=0.3, pv_threshold=1.5), dict(causal=True, skipped="pooled")),
    "lambda pooled order padding": (dict(topk=0.3, pv_threshold=1.5),
                                    dict(skipped="pooled", padded=True, shuffled=True, sink_keys=[(0, 20)],
                                         dense_queries=[(700, 701)])),
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("dim", (64, 96, 128, 160, 192, 256))
def test_every_configuration(dim, pv_dtype, switches):
    thresholds, call = switches
    call = dict(call)
    q, k, v = drifting_qkv(2, 4, N, dim, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    if call.pop("padded", False):
        call["key_padding_mask"] = torch.rand(2, N, device="cuda") < torch.tensor([[0.2], [0.7]], device="cuda")
    if call.pop("shuffled", False):
        call["order"] = torch.stack([torch.arange(N).roll(300), torch.arange(N).flip(0)]).int().cuda()
    params = SpargeParams(similarity_threshold=0.3, **thresholds)
    check_call(q, k, v, params=params, pv_dtype=pv_dtype, scale=8 / dim, min_kept=0.02, max_kept=0.97, **call)


# Bounds of the relative L1 against float64: what INT8 Q·Kᵀ and the format of P·V cost when every block is kept.
KEEP_ALL_BOUNDS = {"fp16": 0.02, "int8": 0.025}
DEFAULT_BOUNDS = {"fp16": 0.045, "int8": 0.05}
STRUCTURED = {"video": dict(grid=(10, 30, 40), heads=4, dim=128), "image and text": dict(grid=(1, 64, 64), heads=6,
                                                                                        dim=64, text=154)}


@pytest.mark.parametrize("case", STRUCTURED.values(), ids=STRUCTURED.keys())
@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_close_to_dense_on_structured_inputs(pv_dtype, case):
    q, k, v = video_qkv(**case)
    exact = dense_attention(q, k, v)
    errors = {}
    for name, params, bound in (("every block", SpargeParams(cdf_threshold=1.0), KEEP_ALL_BOUNDS[pv_dtype]),
                                ("default thresholds", SpargeParams(), DEFAULT_BOUNDS[pv_dtype])):
        out, stats = sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, impl="triton", return_stats=True)
        errors[name] = relative_l1(out, exact)
        assert errors[name] <= bound, f"{name}: {errors[name]:.4f} > {bound}, kept {stats.kept.mean().item():.3f}"
    # Mixed channels cost inputs like these up to 1.2 times (tests/bench/README.md, "Formats of P·V").
    assert math.isfinite(errors["every block"]) and errors["every block"] <= errors["default thresholds"] * 1.25

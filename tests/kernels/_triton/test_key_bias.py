"""A bias on keys: exact in the kernel, padding for the map where it hides a key."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_sparse_attention, dense_attention, sparge_attention
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels import eager
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, PV_FORMATS, recorded_maps, reference_with

N = 300
ALL = SpargeParams(topk=1.0)
LIMITS = {"fp16": 0.02, "int8": 0.03}  # of the relative L1 with every block: what rounding alone gives on these inputs


def hidden(value=torch.finfo(torch.float32).min):
    """Some keys hidden by the value, whole blocks among them."""
    bias = torch.zeros(2, N)
    bias[0, 100:110], bias[1, 64:200], bias[1, 290:] = value, value, value
    return bias


BIASES = {
    "random": torch.randn(2, N, generator=torch.Generator().manual_seed(0)) * 2,
    "hidden": hidden(),
    "hidden by infinity": hidden(-math.inf),
    "hidden in float16": hidden(-65504.0).half(),
    "one key": torch.zeros(2, N).index_fill(1, torch.tensor([77]), 3.0),
    "opposite": torch.zeros(2, N).index_fill(1, torch.tensor([70]), 2.0).index_fill(1, torch.tensor([71]), -2.0),
    "all alike": torch.full((2, N), -2e4),
    "noncontiguous": (torch.randn(N, 2, generator=torch.Generator().manual_seed(1)) * 2).T,
}


def inputs(n_q=N):
    return drifting_qkv(2, 2, n_q, 64, k_tokens=N, kv_heads=1, dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
def test_every_block(bias, pv_dtype, small_blocks):
    q, k, v = inputs(150)
    bias = bias.to(DEVICE)
    out = sparge_attention(q, k, v, params=ALL, key_bias=bias, pv_dtype=pv_dtype, impl="triton")
    assert relative_l1(out, dense_attention(q, k, v, key_bias=bias)) < LIMITS[pv_dtype]
    exact, _, _ = eager.sparge_attention(q.double(), k.double(), v.double(), params=ALL, key_bias=bias)
    assert relative_l1(exact, dense_attention(q, k, v, key_bias=bias)) < 1e-6  # biases are float32


@pytest.mark.parametrize("call", [
    dict(), dict(skipped="pooled"), dict(causal=True), dict(order=True), dict(padding=True)], ids=str)
def test_map_and_switches(call, small_blocks):
    """The map is the reference's, and so is the result with it."""
    q, k, v = inputs()
    bias = (BIASES["random"] + BIASES["hidden"]).T.contiguous().T.to(DEVICE)
    if call.pop("order", False):
        call["order"] = torch.arange(N, device=DEVICE).roll(50)
    if call.pop("padding", False):
        call["key_padding_mask"] = (torch.arange(N, device=DEVICE) % 7 == 3).expand(2, -1)
    call |= dict(params=SpargeParams(cdf_threshold=0.6, similarity_threshold=0.3), key_bias=bias)
    with recorded_maps() as maps:
        out = sparge_attention(q, k, v, pv_dtype="fp16", impl="triton", **call)
    call["block"] = maps[0].block
    _, expected, _ = eager.sparge_attention(q.float(), k.float(), v.float(), **call)
    mask = maps[0].mask()
    assert (mask != expected.mask()).double().mean() < 0.01, "more than rounding of scores explains"
    assert mask.double().mean() < 0.9
    exact, _, _ = reference_with(mask, q.double(), k.double(), v.double(), **call)
    assert relative_l1(out, exact) < LIMITS["fp16"]


def test_given_map(small_blocks):
    """Blocks that hold a bias are masked inside, also in a map that the caller gives."""
    q, k, v = inputs(150)
    with recorded_maps() as maps:
        sparge_attention(q, k, v, params=SpargeParams(topk=0.5), impl="triton")
    mask = maps[0].mask()
    for bias in (BIASES["random"], BIASES["opposite"], BIASES["hidden"]):
        bias = bias.to(DEVICE)
        out = block_sparse_attention(q, k, v, mask, key_bias=bias, pv_dtype="fp16", skipped="pooled", impl="triton")
        exact, _, _ = eager.sparge_attention(q.double(), k.double(), v.double(), key_bias=bias, skipped="pooled",
                                             block_mask=mask, block=maps[0].block)
        assert relative_l1(out, exact) < LIMITS["fp16"]


def test_a_bias_of_minus_infinity_is_padding():
    q, k, v = inputs(50)
    mask = torch.isinf(BIASES["hidden by infinity"]).to(DEVICE)
    for impl in ("triton", "reference"):
        biased = sparge_attention(q, k, v, key_bias=BIASES["hidden by infinity"].to(DEVICE), impl=impl)
        padded = sparge_attention(q, k, v, key_padding_mask=mask, impl=impl)
        torch.testing.assert_close(biased, padded, rtol=2e-3, atol=2e-3)


BAD = [(torch.zeros(2, N, dtype=torch.int32), TypeError, "floating"), (torch.zeros(2, N - 1), ValueError, "shape"),
       ([0.0], TypeError, "tensor"), (torch.zeros(N), ValueError, "shape")]


@pytest.mark.parametrize("bias, error, says", BAD, ids=str)
def test_bad_bias(bias, error, says):
    q, k, v = (x.cpu() for x in inputs())
    with pytest.raises(error, match=f"key_bias.*{says}"):
        sparge_attention(q, k, v, key_bias=bias)

"""The log-sum-exp of the attention kernel: with the constant of K that it removes, in every token order."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.tests.assertions import assert_near, relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, DTYPES, LAYOUTS_AND_FORMATS, ON_GPU, recorded_maps
from comfyui_spargeattn.tests.kernels.test_lse import CALLS, exact_lse

N = 1500 if ON_GPU else 150
# What INT8 may move a score of these q and k by at head_dim 64 and a scale of one, in natural units. It grows with the
# root of head_dim, as a sum of independent roundings does.
QUANTISED = 0.6


@pytest.mark.parametrize("layout, pv_dtype", LAYOUTS_AND_FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_against_float64(name, layout, pv_dtype, small_blocks):
    q, k, v = drifting_qkv(2, 4, N, 64, kv_heads=2, dtype=torch.float16, device=DEVICE)
    k = k + 3.0  # a large constant, which softmax ignores and the log-sum-exp must not
    call = CALLS[name](N, DEVICE)
    given = [x if layout == "BHND" else x.transpose(1, 2) for x in (q, k, v)]
    with recorded_maps() as maps:
        out, lse = sparge_attention(*given, layout=layout, pv_dtype=pv_dtype, impl="triton", return_lse=True, **call)
    expected = exact_lse(q, k, maps[0].mask(), maps[0].block, **call)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, N) and lse.is_contiguous()
    seen = expected > -math.inf
    assert torch.equal(seen, lse > -math.inf)
    assert_near(lse[seen], expected[seen], atol=QUANTISED * abs(call.get("scale", 64 ** -0.5)))
    plain = sparge_attention(*given, layout=layout, pv_dtype=pv_dtype, impl="triton", **call)
    if pv_dtype == "int8":  # without it, P is summed as it was rounded
        assert relative_l1(out, plain) < 0.01
    else:
        assert torch.equal(out, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (40, 128))
def test_dtypes(dim, dtype):
    q, k, v = drifting_qkv(1, 2, N, dim, dtype=dtype, device=DEVICE)
    _, lse = sparge_attention(q, k, v, params=SpargeParams(cdf_threshold=1.0), pv_dtype="fp16", impl="triton",
                              return_lse=True)
    expected = (q.double() @ k.double().mT * dim ** -0.5).logsumexp(-1)
    assert_near(lse, expected, atol=QUANTISED * (dim / 64) ** 0.5 * dim ** -0.5)


def test_groups_of_heads(monkeypatch, small_blocks):
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v = drifting_qkv(2, 4, N, 64, kv_heads=2, dtype=torch.float16, device=DEVICE)
    whole = sparge_attention(q, k, v, pv_dtype="fp16", impl="triton", return_lse=True)
    monkeypatch.setattr(pipeline, "is_short", lambda *size: True)
    monkeypatch.setattr(pipeline, "groups_of_heads", lambda *size: [(0, 1), (1, 2)])
    groups = sparge_attention(q, k, v, pv_dtype="fp16", impl="triton", return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, groups, strict=True))

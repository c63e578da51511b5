"""NaN and infinity: rows that dense attention makes NaN are NaN here, and padding hides what it covers."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_shape, dense_attention, sparge_attention
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, PV_FORMATS

N = 420  # more than are sampled in these tests
TOKEN = 333
CDF = SpargeParams(cdf_threshold=0.3, similarity_threshold=-1.0)
CALLS = {"cdf": dict(params=CDF), "topk": dict(params=SpargeParams(topk=0.1), skipped="pooled"),
         "judge": dict(params=SpargeParams(cdf_threshold=0.3, similarity_threshold=0.3), skipped="pooled"),
         "lambda": dict(params=SpargeParams(topk=0.1, pv_threshold=1.0))}


def dense_is_nan(q, k, v, **call):
    return dense_attention(q, k, v, **call).isnan().any(-1)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """The token that is not finite is in no sample of K and V."""
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", 64)
    place = torch.arange(64, dtype=torch.int64)
    assert TOKEN not in (((place * 2654435769) & 0xFFFFFFFF) * N >> 32).tolist()


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("where", "qkv")
@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_reaches_the_rows_that_dense_attention_breaks(where, value, pv_dtype, small_blocks):
    tensors = dict(zip("qkv", drifting_qkv(1, 1, N, 16, dtype=torch.float16, device=DEVICE)))
    tensors[where][0, 0, TOKEN, 5] = value
    expected = dense_is_nan(**tensors)
    infinite_v = where == "v" and math.isinf(value)  # dense attention makes it infinite where the weight is not zero
    assert expected.any() or infinite_v
    for name, call in CALLS.items():
        out = sparge_attention(**tensors, **call, pv_dtype=pv_dtype, impl="triton")
        broken = ~out.isfinite().all(-1)
        assert bool((broken | ~expected).all()), f"{name}: finite where dense attention is not"
        assert not infinite_v or bool(broken.all()), f"{name}: infinity in V is lost"
        if where == "q":
            assert bool(out[0, 0, :64].isfinite().all()), "it spread beyond the block of its query"
        out = sparge_attention(**tensors, **call, impl="reference")
        assert bool((~out.isfinite().all(-1) | ~expected).all()), f"{name}: the reference hides it"


@pytest.mark.parametrize("where, skipped", [("k", "drop"), ("k", "pooled"), ("v", "pooled")])
def test_causal_rows_before_it_stay(where, skipped, small_blocks):
    q, k, v = drifting_qkv(1, 1, N, 16, dtype=torch.float16, device=DEVICE)
    (k if where == "k" else v)[0, 0, TOKEN] = math.nan
    out = sparge_attention(q, k, v, params=CDF, causal=True, pv_dtype="fp16", skipped=skipped, impl="triton")
    assert bool(out[0, 0, TOKEN:].isnan().all())
    block = block_shape(q, pv_dtype="fp16", impl="triton")
    seen_from = TOKEN // block.k * block.k  # one scale for a block of K
    assert bool(out[0, 0, :seen_from // block.q * block.q].isfinite().all())


@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_in_the_sample(skipped, small_blocks):
    """The constants of K and V come from it: the head is NaN, others are not."""
    for which in (1, 2):
        tensors = drifting_qkv(1, 2, N, 16, dtype=torch.float16, device=DEVICE)
        tensors[which][0, 1, 0, 3] = math.nan  # token 0 is always sampled
        out = sparge_attention(*tensors, params=CDF, pv_dtype="fp16", skipped=skipped, impl="triton")
        assert bool(out[:, 1].isnan().any(-1).all()) and bool(out[:, 0].isfinite().all())


def test_padding_and_bias_hide_it(small_blocks):
    q, k, v = drifting_qkv(1, 1, N, 16, dtype=torch.float16, device=DEVICE)
    k[0, 0, 300:], v[0, 0, 300:] = math.nan, math.inf
    mask = torch.arange(N, device=DEVICE)[None] >= 300
    for call in (dict(key_padding_mask=mask), dict(key_bias=torch.zeros(1, N, device=DEVICE).masked_fill(mask, -1e9))):
        assert bool(sparge_attention(q, k, v, impl="triton", pv_dtype="fp16", **call).isfinite().all())


def test_large_and_finite_stays_finite(small_blocks):
    for which in (0, 1):  # squares of the row are beyond float32
        tensors = drifting_qkv(1, 1, 200, 16, dtype=torch.float32, device=DEVICE)
        tensors[which][0, 0, 150] = 1e20
        out = sparge_attention(*tensors, scale=1e-20, impl="triton", pv_dtype="fp16")
        assert bool(out.isfinite().all())

"""With thresholds that keep every block, SpargeAttn is dense attention."""
import pytest
import torch
import torch.nn.functional as F

from comfyui_spargeattn.kernels import SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.tests.assertions import assert_near, relative_l1
from comfyui_spargeattn.tests.cases import random_qkv

KEEP_ALL = {"cdf": SpargeParams(cdf_threshold=1.0), "topk": SpargeParams(topk=1.0),
            "judge": SpargeParams(cdf_threshold=0.1, similarity_threshold=1.0)}
CALLS = {
    "plain": {},
    "causal": dict(causal=True),
    "scale": dict(scale=0.3),
    "pooled": dict(skipped="pooled"),
    "causal pooled": dict(causal=True, skipped="pooled"),
    "ranges": dict(sink_keys=[(3, 5)], dense_queries=[(0, 1), (200, 260)]),
}


def reference(q, k, v, **call):
    return sparge_attention(q, k, v, impl="reference", **call)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("params", KEEP_ALL.values(), ids=KEEP_ALL.keys())
def test_equals_dense(params, call):
    q, k, v = random_qkv(2, 4, 260, 24, kv_heads=2, dtype=torch.float64)
    plain = {name: value for name, value in call.items() if name in ("scale", "causal")}
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1),
                                              is_causal=plain.get("causal", False), scale=plain.get("scale"))
    assert_near(dense_attention(q, k, v, **plain), expected, atol=1e-12, what="dense_attention")
    out, stats = reference(q, k, v, params=params, return_stats=True, **call)
    assert_near(out, expected, atol=1e-12, what="sparge_attention")
    assert bool((stats.kept == 1).all()) and bool((stats.sparsity == 0).all()) and bool((stats.pv_skipped == 0).all())


@pytest.mark.parametrize("n_q, n_k", [(1, 1), (1, 200), (200, 1), (63, 64), (129, 65), (64, 1000)])
@pytest.mark.parametrize("causal", (False, True))
def test_lengths(n_q, n_k, causal):
    q, k, v = random_qkv(1, 2, n_q, 8, k_tokens=n_k, dtype=torch.float64)
    out = reference(q, k, v, params=KEEP_ALL["cdf"], causal=causal)
    assert_near(out, F.scaled_dot_product_attention(q, k, v, is_causal=causal), atol=1e-12)


@pytest.mark.parametrize("causal", (False, True))
def test_dense_attention_in_chunks_of_rows(causal):
    q, k, v = random_qkv(1, 1, 2100, 4, k_tokens=2050, dtype=torch.float64)
    assert_near(dense_attention(q, k, v, causal=causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal),
                atol=1e-12)


@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_padding(skipped):
    q, k, v = random_qkv(3, 2, 100, 16, k_tokens=200, dtype=torch.float64)
    padding = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)) < 0.4
    padding[1, 64:] = True
    padding[2] = True  # nothing to attend: zeros
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None]).nan_to_num(0.0)
    k, v = (x.masked_fill(padding[:, None, :, None], float("nan")) for x in (k, v))  # padding may hold anything
    out = reference(q, k, v, params=KEEP_ALL["cdf"], key_padding_mask=padding, skipped=skipped)
    assert_near(out, expected, atol=1e-12, what="sparge_attention")
    k, v = (x.nan_to_num(0.0) for x in (k, v))
    assert_near(dense_attention(q, k, v, key_padding_mask=padding), expected, atol=1e-12, what="dense_attention")


def test_order_does_not_matter():
    q, k, v = random_qkv(2, 4, 150, 16, kv_heads=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    orders = torch.stack([torch.randperm(150, generator=generator) for _ in range(2)])
    expected = dense_attention(q, k, v)
    for order in (orders[0], orders, orders.int()):
        assert_near(reference(q, k, v, params=KEEP_ALL["cdf"], order=order), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_low_precision_rounds_once(dtype):
    """Half precision is computed in float32: the error is the output's rounding."""
    q, k, v = random_qkv(1, 2, 200, 64, dtype=dtype)
    out = reference(q, k, v, params=KEEP_ALL["cdf"])
    assert out.dtype == dtype and out.is_contiguous()
    exact = dense_attention(q, k, v)
    assert_near(out, exact, atol=exact.abs() * torch.finfo(dtype).eps / 2 + 2e-6)


def test_layouts_and_views():
    q, k, v = random_qkv(2, 3, 70, 16, dtype=torch.float64)
    expected = reference(q, k, v)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = reference(q, k, v, layout="BNHD")
    assert out.shape == q.shape and out.is_contiguous() and torch.equal(out.transpose(1, 2), expected)
    packed = torch.stack([q, k, v], 2)  # (B, N, 3, H, D), as a fused projection leaves it
    assert torch.equal(reference(*packed.unbind(2), layout="BNHD"), out)
    wide = torch.stack([q, q, q], -1)  # a last dimension that is not contiguous
    assert torch.equal(reference(wide[..., 1], k, v, layout="BNHD"), out)


@pytest.mark.parametrize("quantise, bound", [("fp16", 0.02), ("int8", 0.03)])
def test_emulated_formats(quantise, bound):
    """Relative L1 of the emulated number formats on white noise, where no error cancels."""
    q, k, v = random_qkv(1, 2, 300, 64)
    exact = dense_attention(q, k, v)
    out = reference(q, k, v, params=KEEP_ALL["cdf"], pv_dtype=quantise)
    error = relative_l1(out, exact)
    assert 1e-4 < error < bound

"""A residual in the attention kernel: made from dense attention, added to a later call."""
import pytest
import torch

from comfyui_spargeattn.kernels import Residual, SpargeParams, attention_residual, dense_attention, sparge_attention
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, DTYPES, LAYOUTS_AND_FORMATS, ON_GPU

N = 1500 if ON_GPU else 150
PARAMS = SpargeParams(cdf_threshold=0.5, similarity_threshold=-1.0)
ORDER = torch.arange(N, device=DEVICE).roll(37)
CALLS = {
    "plain": {},
    "pooled": dict(skipped="pooled"),
    "order by head": dict(order=torch.stack([ORDER, ORDER.flip(0)])),
    "causal": dict(causal=True),
    "per head": dict(params=SpargeParams(topk=torch.tensor([0.2, 0.4, 0.6, 0.8], device=DEVICE), pv_threshold=2.0)),
}


def inputs(dtype=torch.float32, dim=64, layout="BHND"):
    q, k, v = drifting_qkv(2, 4, N, dim, kv_heads=2, dtype=dtype, device=DEVICE)
    dense = dense_attention(q, k, v).to(dtype)
    return [x if layout == "BHND" else x.transpose(1, 2).contiguous() for x in (q, k, v, dense)]


def assert_same(made: Residual, difference: torch.Tensor):
    """`made` holds `difference` to half of an INT8 step of each row, and to float32's own rounding."""
    step = difference.abs().amax(-1, keepdim=True) / 127
    assert_near(made.tensor(), difference, atol=0.51 * step + 2e-6, what="residual")


@pytest.mark.parametrize("layout, pv_dtype", LAYOUTS_AND_FORMATS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_is_what_dense_attention_has_beyond(call, layout, pv_dtype, small_blocks):
    q, k, v, dense = inputs(layout=layout)
    call = dict(params=PARAMS, layout=layout, pv_dtype=pv_dtype, impl="triton") | call
    before = dense.clone()
    made = attention_residual(q, k, v, dense, **call)
    assert torch.equal(dense, before)
    difference = dense - sparge_attention(q, k, v, **call)
    difference = difference if layout == "BHND" else difference.transpose(1, 2)
    assert difference.abs().max() > 0.01, "the sparse call is dense"
    assert_same(made, difference)


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_is_added(call, layout, small_blocks):
    q, k, v, _ = inputs(layout=layout)
    call = dict(params=PARAMS, layout=layout, pv_dtype="fp16", impl="triton") | call
    residual = Residual.of(torch.randn(2, 4, N, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    added = residual.tensor() if layout == "BHND" else residual.tensor().transpose(1, 2)
    out, stats = sparge_attention(q, k, v, residual=residual, return_stats=True, **call)
    expected, expected_stats = sparge_attention(q, k, v, return_stats=True, **call)
    assert_near(out, expected + added, atol=2e-6)
    assert torch.equal(stats.kept, expected_stats.kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (40, 72, 128))
def test_gives_dense_attention_back(dim, dtype, small_blocks):
    q, k, v, dense = inputs(dtype, dim)
    call = dict(params=PARAMS, pv_dtype="fp16", impl="triton")
    made = attention_residual(q, k, v, dense, **call)
    out = sparge_attention(q, k, v, residual=made, **call)
    step = made.scale[..., None] + dense.abs() * torch.finfo(dtype).eps
    assert_near(out, dense, atol=0.51 * step + 2e-6)


@pytest.mark.parametrize("layout, pv_dtype", LAYOUTS_AND_FORMATS)
@pytest.mark.parametrize("call, dim", (("order by head", 64), ("pooled", 72)))
def test_leads_beyond_an_earlier_one(call, dim, layout, pv_dtype, small_blocks):
    q, k, v, dense = inputs(dim=dim, layout=layout)
    call = dict(params=PARAMS, layout=layout, pv_dtype=pv_dtype, impl="triton") | CALLS[call]
    earlier = 0.1 * torch.randn(3, 4, N, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    earlier = Residual.of(earlier).batch(1, 3)
    led = attention_residual(q, k, v, dense, earlier=earlier, lead=0.3, **call)
    difference = dense - sparge_attention(q, k, v, **call)
    difference = difference if layout == "BHND" else difference.transpose(1, 2)
    assert_same(led, difference + 0.3 * (difference - earlier.tensor()))


def test_batch_entries_alone(small_blocks):
    """Conditions that were evaluated together may come one by one later."""
    q, k, v, dense = inputs()
    call = dict(params=PARAMS, pv_dtype="fp16", impl="triton")
    made = attention_residual(q, k, v, dense, **call)
    together = sparge_attention(q, k, v, residual=made, **call)
    alone = sparge_attention(q[1:], k[1:], v[1:], residual=made.batch(1, 2), **call)
    assert torch.equal(alone, together[1:])


def test_groups_of_heads(monkeypatch, small_blocks):
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v, dense = inputs()
    call = dict(params=PARAMS, pv_dtype="fp16", impl="triton")
    made = attention_residual(q, k, v, dense, **call)
    led = attention_residual(q, k, v, dense, earlier=made, lead=0.5, **call)
    out = sparge_attention(q, k, v, residual=made, **call)
    monkeypatch.setattr(pipeline, "is_short", lambda *size: True)
    monkeypatch.setattr(pipeline, "groups_of_heads", lambda *size: [(0, 1), (1, 2)])
    for how, whole in ((call, made), (call | dict(earlier=made, lead=0.5), led)):
        in_groups = attention_residual(q, k, v, dense, **how)
        assert torch.equal(in_groups.quantised, whole.quantised) and torch.equal(in_groups.scale, whole.scale)
    assert torch.equal(sparge_attention(q, k, v, residual=made, **call), out)


def test_not_finite_is_nothing(small_blocks):
    """A residual outlives its call: NaN in it would reach rows that are sound by then."""
    q, k, v, dense = inputs()
    dense[0, 1, 3], dense[1, 0, 5, 7] = torch.nan, torch.inf
    made = attention_residual(q, k, v, dense, params=PARAMS, pv_dtype="fp16", impl="triton")
    assert bool(made.tensor().isfinite().all())
    assert not made.tensor()[0, 1, 3].any() and not made.tensor()[1, 0, 5, 7].any()
    assert made.tensor()[1, 0, 5].any()

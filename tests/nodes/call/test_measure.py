"""The error of a setting on one call, with and without a refresh before it, against the definition."""
import pytest
import torch

from comfyui_spargeattn.kernels import Residual, SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.measure import CallMeasure, RefreshedCall
from comfyui_spargeattn.nodes.call.token_layout import TokenLayout
from comfyui_spargeattn.nodes.tuned.candidates import TunedSetting
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv

HEADS, KV_HEADS, DIM = 4, 2, 32
LAYOUT = TokenLayout((3, 8, 16), before=5)
AMOUNTS = torch.tensor([0.3, 0.6, 0.9, 1.0])


def setting(curve, skipped):
    params = SpargeParams(cdf_threshold=AMOUNTS, similarity_threshold=torch.full((HEADS,), -1.0))
    return TunedSetting(params, (curve,) * KV_HEADS, skipped, "fp16")


@pytest.fixture(scope="module")
def steps():
    """q, k, v of two steps that differ a little, batches of two."""
    now = drifting_qkv(2, HEADS, LAYOUT.tokens, DIM, kv_heads=KV_HEADS)
    generator = torch.Generator().manual_seed(1)
    before = [x + 0.05 * torch.randn(x.shape, generator=generator) for x in now]
    return before, now


def expected(steps, chosen, refreshed, bias=(None, None)):
    """L1 of each head by the definition, the worst of the batch."""
    order = LAYOUT.order(chosen.curves[0], torch.device("cpu"))
    dense, sparse = [], []
    for qkv, key_bias in zip(steps, bias):
        dense.append(dense_attention(*qkv, key_bias=key_bias).float())
        sparse.append(sparge_attention(*qkv, params=chosen.params, skipped=chosen.skipped, pv_dtype="fp16",
                                       order=order, sink_keys=LAYOUT.sink_keys(True), key_bias=key_bias))
    out = sparse[1]
    if refreshed:
        out = out + Residual.of(dense[0] - sparse[0]).tensor()
    return ((out - dense[1]).abs().sum((2, 3)) / dense[1].abs().sum((2, 3))).amax(0)


def measured(steps, chosen, refreshed, layout="BHND", mask=(None, None)):
    def call(qkv, mask):
        return AttentionCall(*(x if layout == "BHND" else x.transpose(1, 2).contiguous() for x in qkv), layout,
                             mask=mask, enable_gqa=True)

    def dense(call):
        q, k, v = (x if layout == "BHND" else x.transpose(1, 2) for x in (call.q, call.k, call.v))
        out = dense_attention(q, k, v, **call.key_mask).float()
        return out if layout == "BHND" else out.transpose(1, 2)

    before, now = (call(*x) for x in zip(steps, mask))
    found = CallMeasure(now, LAYOUT, dense(now), refreshed=RefreshedCall(before, dense(before)) if refreshed else None)
    return found(chosen)


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
@pytest.mark.parametrize("refreshed", (False, True))
@pytest.mark.parametrize("curve, skipped", (("row-major", "drop"), ("hilbert", "pooled")))
def test_the_error_is_that_of_the_definition(steps, layout, refreshed, curve, skipped):
    chosen = setting(curve, skipped)
    assert_near(measured(steps, chosen, refreshed, layout).error, expected(steps, chosen, refreshed), atol=1e-5)


def test_a_residual_is_extrapolated_from_that_of_the_refresh_before(steps):
    """A line through three steps that lie on one leads there, but for rounding."""
    chosen = setting("hilbert", "pooled")
    order, device = LAYOUT.order("hilbert", torch.device("cpu")), dict(sink_keys=LAYOUT.sink_keys(True))
    how = dict(params=chosen.params, skipped="pooled", pv_dtype="fp16", order=order, **device)
    calls = [AttentionCall(*qkv, "BHND", enable_gqa=True) for qkv in steps]
    before, now = (RefreshedCall(call, dense_attention(call.q, call.k, call.v).float()) for call in calls)
    first, second = (made.residual(how).tensor() for made in (before, now))
    led = now._replace(earlier=before, lead=0.5).residual(how).tensor()
    assert_near(led, second + 0.5 * (second - first), atol=0.02 * second.abs().amax().item())
    assert (led - second).abs().mean() > 0.1 * (second - first).abs().mean()


def test_each_step_has_its_own_mask(steps):
    generator = torch.Generator().manual_seed(2)
    bias = [torch.randn(2, LAYOUT.tokens, generator=generator) for _ in range(2)]
    chosen = setting("hilbert", "drop")
    found = measured(steps, chosen, True, mask=[x[:, None, None] for x in bias])
    assert_near(found.error, expected(steps, chosen, True, bias), atol=1e-5)


def test_a_refresh_of_a_similar_call_takes_most_of_the_error_away(steps):
    chosen = setting("row-major", "drop")
    plain, refreshed, same = (measured(x, chosen, r) for x, r in ((steps, False), (steps, True),
                                                                  ((steps[1], steps[1]), True)))
    assert (refreshed.error[:3] < 0.7 * plain.error[:3]).all() and (plain.error[:2] > 0.05).all()
    assert (same.error < 0.01).all()  # the rounding of the residual
    assert torch.equal(plain.kept, refreshed.kept)

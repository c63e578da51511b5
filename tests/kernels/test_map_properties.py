"""Properties of the block map over random shapes and thresholds."""
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_spargeattn.kernels import BlockShape, SpargeParams
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels.eager import sparge_attention

BLOCK = BlockShape(16, 8)
repeatable = settings(deadline=None, derandomize=True, max_examples=40)
fractions = st.floats(0.01, 1.0)
similarities = st.sampled_from([-1.0, 0.3, 0.7, 1.0])


@st.composite
def inputs(draw, max_n=80):
    """q, k, v in float64, two key heads."""
    n_q, n_k = draw(st.integers(1, max_n)), draw(st.integers(1, max_n))
    return drifting_qkv(draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2)), n_q, 8, k_tokens=n_k, kv_heads=2,
                        dtype=torch.float64, seed=draw(st.integers(0, 1000)))


def run(q, k, v, params, **call):
    out, block_map, stats = sparge_attention(q, k, v, params=params, block=BLOCK, **call)
    return out, block_map.mask(), stats


def visible_blocks(q, k, causal):
    """bool (nq, nk), block pairs with anything to attend."""
    nq, nk = BLOCK.counts(q.shape[2], k.shape[2])
    last_row = (torch.arange(1, nq + 1) * BLOCK.q).clamp(max=q.shape[2]) - 1
    reached = torch.arange(nk) * BLOCK.k <= last_row[:, None]
    return reached if causal else torch.ones_like(reached)


@repeatable
@given(inputs(), fractions, similarities, st.booleans(), st.sampled_from(["cdf_threshold", "topk"]), st.booleans())
def test_every_row_keeps_something_visible(qkv, amount, similarity, causal, selection, pooled):
    q, k, v = qkv
    out, mask, stats = run(q, k, v, SpargeParams(**{selection: amount}, similarity_threshold=similarity),
                           causal=causal, skipped="pooled" if pooled else "drop")
    visible = visible_blocks(q, k, causal)
    assert bool((mask.sum(-1) >= 1).all())
    assert not bool((mask & ~visible).any())
    assert bool(out.isfinite().all())
    assert bool((out.abs() <= v.abs().amax((2, 3)).repeat_interleave(q.shape[1] // 2, 1)[..., None, None] + 1e-9).all())
    assert_near(stats.kept, mask.sum((-2, -1)) / visible.sum(), atol=1e-6)


@repeatable
@given(inputs(), fractions, fractions, similarities, st.booleans(), st.sampled_from(["cdf_threshold", "topk"]))
def test_monotone_in_the_amount(qkv, a, b, similarity, causal, selection):
    small, large = (run(*qkv, SpargeParams(**{selection: x}, similarity_threshold=similarity), causal=causal)[1]
                    for x in sorted((a, b)))
    assert not bool((small & ~large).any())


@repeatable
@given(inputs(), fractions)
def test_topk_keeps_its_share(qkv, topk):
    mask = run(*qkv, SpargeParams(topk=topk, similarity_threshold=-1.0))[1]
    assert bool((mask.sum(-1) == math.ceil(topk * mask.shape[-1] - 1e-3)).all())


@repeatable
@given(inputs(), fractions, st.data())
def test_sinks_and_dense_queries_are_whole(qkv, tau, data):
    q, k, v = qkv
    key = data.draw(st.integers(0, k.shape[2] - 1))
    query = data.draw(st.integers(0, q.shape[2] - 1))
    params = SpargeParams(cdf_threshold=tau, similarity_threshold=-1.0)
    mask = run(q, k, v, params, sink_keys=[(key, key + 1)], dense_queries=[(query, query + 1)])[1]
    assert bool(mask[:, :, :, key // BLOCK.k].all()) and bool(mask[:, :, query // BLOCK.q].all())
    plain = run(q, k, v, params)[1]
    assert torch.equal(run(q, k, v, params, sink_keys=[(key, key)])[1], plain), "an empty range asks for nothing"


@repeatable
@given(st.integers(1, 80), st.integers(0, 1000), fractions, similarities, st.booleans())
def test_order_is_a_permutation_before_and_after(n, seed, tau, similarity, pooled):
    """`order` equals permuting q, k, v and the padding, and permuting the output back."""
    q, k, v = drifting_qkv(2, 4, n, 8, kv_heads=2, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    padding = torch.rand(2, n, generator=generator) < 0.2
    params = SpargeParams(cdf_threshold=tau, similarity_threshold=similarity)
    skipped = "pooled" if pooled else "drop"
    out, mask, _ = run(q, k, v, params, order=order, key_padding_mask=padding, skipped=skipped)
    permuted, expected, _ = run(*(x[:, :, order] for x in (q, k, v)), params, key_padding_mask=padding[:, order],
                                skipped=skipped)
    assert torch.equal(mask, expected)
    assert_near(out[:, :, order], permuted, atol=1e-12)


@repeatable
@given(inputs(), fractions, st.data())
def test_padding_is_as_if_absent(qkv, tau, data):
    """Padding at the end changes nothing but the length."""
    q, k, v = qkv
    n = data.draw(st.integers(1, k.shape[2]))
    padding = (torch.arange(k.shape[2]) >= n).expand(len(q), -1)
    params = SpargeParams(cdf_threshold=tau, similarity_threshold=0.5, pv_threshold=2.0)
    out, mask, stats = run(q, k, v, params, key_padding_mask=padding)
    shorter, expected, expected_stats = run(q, k[:, :, :n], v[:, :, :n], params)
    assert torch.equal(mask[..., :expected.shape[-1]], expected) and not bool(mask[..., expected.shape[-1]:].any())
    assert_near(out, shorter, atol=1e-12)
    assert torch.equal(stats.kept, expected_stats.kept) and torch.equal(stats.pv_skipped, expected_stats.pv_skipped)


@repeatable
@given(inputs(), fractions)
def test_bias_on_keys_changes_nothing(qkv, tau):
    """Smoothing: softmax ignores a vector added to every key, and so does the map."""
    q, k, v = qkv
    params = SpargeParams(cdf_threshold=tau)
    out, mask, _ = run(q, k, v, params)
    shifted, shifted_mask, _ = run(q, k + torch.arange(8.0, dtype=torch.float64), v, params)
    assert torch.equal(mask, shifted_mask)
    assert_near(shifted, out, atol=1e-10)


def test_equal_scores_are_chosen_together():
    """Constant tokens: every block scores alike, so none can be left out."""
    x = torch.ones(1, 1, 64, 8, dtype=torch.float64)
    for params in (SpargeParams(cdf_threshold=0.1), SpargeParams(topk=0.1)):
        assert bool(run(x, x, x, params)[1].all())

"""The eager reference in float64 against the method written a second time, as plain loops over blocks and rows."""
import math

import numpy as np
import pytest
import torch

from comfyui_spargeattn.kernels import BlockShape, SpargeParams
from comfyui_spargeattn.kernels.reference import ROW_GROUP, sparge_attention
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv

BLOCK = BlockShape(2 * ROW_GROUP, 8)


def blocks_of(n, size):
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def self_similarity(rows):
    """Mean over all pairs, of a row with itself too, of the cosine."""
    pairs = [(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a in rows for b in rows]
    return sum(pairs) / len(pairs)


def select(scores, params, n_visible):
    """Positions that TopCdf or TopK chooses among `scores` {block: score}."""
    ranked = sorted(scores, key=scores.get, reverse=True)
    if params.topk is not None:
        return set(ranked[:math.ceil(params.topk * n_visible - 1e-3)])
    largest = max(scores.values(), default=0.0)
    mass = {j: math.exp(score - largest) for j, score in scores.items()}
    chosen, total = set(), 0.0
    for j in ranked:
        if total >= params.cdf_threshold * sum(mass.values()):
            break
        chosen.add(j)
        total += mass[j]
    return chosen


def one_head(q, k, v, params, *, valid, sinks, dense_queries, causal=False, scale, skipped):
    """(output, kept {(i, j)}, visible pairs, skipped (row group, block) pairs) of q (Nq, D), k, v (Nk, D)."""
    k = k - k[valid].mean(0) if valid.any() else k
    q_blocks, k_blocks = blocks_of(len(q), BLOCK.q), blocks_of(len(k), BLOCK.k)
    held = [[t for t in block if valid[t]] for block in k_blocks]
    k_means = {j: k[tokens].mean(0) for j, tokens in enumerate(held) if tokens}
    exact_columns = {j for j in k_means if self_similarity(k[held[j]]) < params.similarity_threshold
                     or sinks & set(k_blocks[j])}
    kept, visible, skips = set(), set(), 0
    out = np.zeros((len(q), v.shape[1]))
    for i, rows in enumerate(q_blocks):
        seen = {j for j in k_means if not causal or k_blocks[j][0] <= rows[-1]}
        visible |= {(i, j) for j in seen}
        if self_similarity(q[rows]) < params.similarity_threshold or dense_queries & set(rows):
            row = seen
        else:
            cut = {j for j in seen if causal and k_blocks[j][0] + BLOCK.k - 1 > rows[0]}
            ruled = cut | (exact_columns & seen)
            scores = {j: q[rows].mean(0) @ k_means[j] * scale for j in seen - ruled}
            row = ruled | select(scores, params, len(seen))
        kept |= {(i, j) for j in row}

        for group in blocks_of(BLOCK.q, ROW_GROUP):
            group = [rows[0] + r for r in group]
            # Rows past the end of the sequence take part in the group's test as zeros.
            queries = [q[r] * scale * math.log2(math.e) if r < len(q) else np.zeros(q.shape[1]) for r in group]
            top, total = np.full(len(group), -math.inf), np.zeros(len(group))
            acc = np.zeros((len(group), v.shape[1]))
            for j in sorted(row):
                s = np.array([[x @ k[t] if not causal or t <= r else -math.inf for t in held[j]]
                              for r, x in zip(group, queries)])
                local = s.max(1)
                new_top = np.maximum(top, local)
                safe = np.where(np.isfinite(new_top), new_top, 0.0)
                p, decay = np.exp2(s - safe[:, None]), np.exp2(top - safe)
                total, acc, top = total * decay + p.sum(1), acc * decay[:, None], new_top
                if max(np.where(np.isfinite(local), local - safe, -math.inf)) < -params.pv_threshold:
                    skips += 1
                else:
                    acc += p @ v[held[j]]
            if skipped == "pooled":
                for j in sorted(seen - row):
                    s = np.array([x @ k_means[j] for x in queries])
                    new_top = np.maximum(top, s)
                    p, decay = np.exp2(s - new_top) * len(held[j]), np.exp2(top - new_top)
                    total, top = total * decay + p, new_top
                    acc = acc * decay[:, None] + p[:, None] * v[held[j]].mean(0)
            for r, x, y in zip(group, acc, total):
                if r < len(q) and y > 0:
                    out[r] = x / y
    return out, kept, visible, skips


def all_heads(q, k, v, params, *, padding=None, order=None, sink_keys=(), dense_queries=(), causal=False, scale=None,
              skipped="drop"):
    """What `reference.sparge_attention` returns, as (output, mask, kept fraction, skipped fraction)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, n_q = q.shape[:3]
    nq, nk = BLOCK.counts(n_q, k.shape[2])
    out, mask = torch.empty_like(q), torch.zeros(batch, heads, nq, nk, dtype=torch.bool)
    kept, skipped_pv = torch.empty(batch, heads), torch.empty(batch, heads)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            place = torch.arange(k.shape[2]) if order is None else order.expand(k.shape[1], -1)[kv].long()
            rows = place if order is not None else torch.arange(n_q)
            valid = np.ones(len(place), bool) if padding is None else ~padding[b, place].numpy()

            def inside(ranges, tokens):
                return {i for i, t in enumerate(tokens.tolist()) if any(a <= t < z for a, z in ranges)}

            result, pairs, visible, skips = one_head(
                q[b, h, rows].numpy(), k[b, kv, place].numpy(), v[b, kv, place].numpy(),
                SpargeParams(**{name: float(x[h]) if isinstance(x, torch.Tensor) else x for name, x in params.items()}),
                valid=valid, sinks=inside(sink_keys, place), dense_queries=inside(dense_queries, rows), causal=causal,
                scale=scale, skipped=skipped)
            out[b, h, rows] = torch.from_numpy(result)
            for i, j in pairs:
                mask[b, h, i, j] = True
            kept[b, h] = len(pairs) / max(1, len(visible))
            skipped_pv[b, h] = skips / max(1, len(pairs) * (BLOCK.q // ROW_GROUP))
    return out, mask, kept, skipped_pv


N_Q, N_K = 90, 77
PADDING = torch.rand(2, N_K, generator=torch.Generator().manual_seed(5)) < 0.3
PADDING[1, 40:60] = True  # whole blocks among them
ORDERS = torch.stack([torch.arange(N_K).roll(30), torch.arange(N_K).flip(0)])
PER_HEAD = SpargeParams(cdf_threshold=torch.tensor([0.3, 0.6, 0.9, 1.0], dtype=torch.float64),
                        similarity_threshold=torch.tensor([-1.0, 0.5, 0.8, 0.9], dtype=torch.float64),
                        pv_threshold=torch.tensor([math.inf, 0.5, 2.0, 8.0], dtype=torch.float64))
CDF = SpargeParams(cdf_threshold=0.7, similarity_threshold=0.5)
TOPK = SpargeParams(topk=0.3, similarity_threshold=0.5)
UNJUDGED = SpargeParams(cdf_threshold=0.5, similarity_threshold=-1.0)
SKIPPING = SpargeParams(cdf_threshold=0.9, similarity_threshold=0.5, pv_threshold=1.0)
CASES = {
    "cdf": (CDF, {}),
    "topk": (TOPK, {}),
    "unjudged": (UNJUDGED, {}),
    "scale": (CDF, dict(scale=0.2)),
    "lambda": (SKIPPING, {}),
    "per head": (PER_HEAD, {}),
    "pooled": (CDF, dict(skipped="pooled")),
    "pooled lambda topk": (SpargeParams(topk=0.4, pv_threshold=1.0), dict(skipped="pooled")),
    "causal": (UNJUDGED, dict(causal=True)),
    "causal pooled": (TOPK, dict(causal=True, skipped="pooled")),
    "causal lambda": (SKIPPING, dict(causal=True)),
    "padding": (CDF, dict(padding=PADDING)),
    "padding pooled topk": (TOPK, dict(padding=PADDING, skipped="pooled")),
    "sinks": (UNJUDGED, dict(sink_keys=[(0, 3), (33, 34), (70, 77)])),
    "dense queries": (UNJUDGED, dict(dense_queries=[(40, 41)])),
    "order": (CDF, dict(order=ORDERS[0])),
    "order per head, all at once": (PER_HEAD, dict(order=ORDERS, padding=PADDING, skipped="pooled",
                                                   sink_keys=[(10, 12)], dense_queries=[(5, 6)])),
}


@pytest.mark.parametrize("params, call", CASES.values(), ids=CASES.keys())
def test_equals_loops(params, call):
    n_q = N_K if "order" in call else N_Q
    q, k, v = drifting_qkv(2, 4, n_q, 8, n_k=N_K, kv_heads=2, dtype=torch.float64)
    q[:, :, 32:64] += torch.randn(2, 4, 32, 8, generator=torch.Generator().manual_seed(3)) * 2  # a dissimilar block
    k[:, :, 16:24] += torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * 4
    expected, mask, kept, skipped = all_heads(q, k, v, params, **call)
    call = {"key_padding_mask" if name == "padding" else name: value for name, value in call.items()}
    out, block_map, stats = sparge_attention(q, k, v, params=params, block=BLOCK, **call)
    assert torch.equal(block_map.mask(), mask)
    assert 0.05 < mask.double().mean() < 0.95, "a map that is all or nothing tests little"
    assert_near(out, expected, atol=1e-11)
    assert_near(stats.kept, kept, atol=1e-6, what="kept")
    assert_near(stats.pv_skipped, skipped, atol=1e-6, what="pv_skipped")
    if any(name == "pv_threshold" and torch.as_tensor(value).min() < 8 for name, value in params.items()):
        assert stats.pv_skipped.max() > 0.02, "the λ test never fired"

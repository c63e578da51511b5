"""The method written a second time, as plain loops over blocks and rows in float64."""
import math

import numpy as np
import torch

from comfyui_spargeattn.kernels import BlockShape, SpargeParams
from comfyui_spargeattn.kernels.formats import ROW_GROUP

BLOCK = BlockShape(2 * ROW_GROUP, 8)


def blocks_of(n, size):
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def self_similarity(rows):
    """Mean over all pairs, of a row with itself too, of the cosine."""
    norms = [max(np.linalg.norm(row), 1e-12) for row in rows]
    pairs = [(a @ b) / (x * y) for a, x in zip(rows, norms) for b, y in zip(rows, norms)]
    return sum(pairs) / len(pairs)


def select(scores, params, n_visible):
    """Positions that TopCdf or TopK chooses among `scores` {block: score}; equal scores are chosen together."""
    ranked = sorted(scores, key=scores.get, reverse=True)
    if params.topk is not None:
        chosen = ranked[:math.ceil(params.topk * n_visible - 1e-3)]
    else:
        largest = max(scores.values(), default=0.0)
        mass = {j: math.exp(score - largest) for j, score in scores.items()}
        chosen, total = [], 0.0
        for j in ranked:
            if total >= params.cdf_threshold * sum(mass.values()):
                break
            chosen.append(j)
            total += mass[j]
    return {j for j in ranked if chosen and scores[j] >= scores[chosen[-1]]}


def one_head(q, k, v, params, *, valid, sinks, dense_queries, causal=False, scale, skipped):
    """(output, kept {(i, j)}, visible pairs, skipped (row group, block) pairs) of q (Nq, D), k, v (Nk, D)."""
    theta = -1.0 if params.topk is not None else params.similarity_threshold  # the judge is for cdf
    k = k - k[valid].mean(0) if valid.any() else k
    q_blocks, k_blocks = blocks_of(len(q), BLOCK.q), blocks_of(len(k), BLOCK.k)
    held = [[t for t in block if valid[t]] for block in k_blocks]
    k_means = {j: k[tokens].mean(0) for j, tokens in enumerate(held) if tokens}
    exact_columns = {j for j in k_means if self_similarity(k[held[j]]) < theta
                     or sinks & set(k_blocks[j])}
    kept, visible, skips = set(), set(), 0
    out = np.zeros((len(q), v.shape[1]))
    for i, rows in enumerate(q_blocks):
        seen = {j for j in k_means if not causal or k_blocks[j][0] <= rows[-1]}
        visible |= {(i, j) for j in seen}
        if self_similarity(q[rows]) < theta or dense_queries & set(rows):
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

"""The block map: predicted scores by one matrix product, then TopCdf or TopK row by row without a sort."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import LOG2E
from ..types import BlockMap, BlockShape
from .prepare import PreparedKeys, PreparedQueries
from .primitives import threshold_of

_CHUNK = 1024  # scores a program looks at together; longer rows take several steps
_BISECTIONS = 26  # leaves 2^-26 of a row's range of scores undecided, below float32's resolution


@dataclass(frozen=True)
class BlockLists:
    """indices int32 (B, H, nq, nk); counts int32 (B, H, nq, 3): how many leading entries need no mask inside their
    block, how many entries there are, and how many dense attention would have; pooled int8 (B, H, nq, nk), 1 where the
    pooled tail stands in, or None."""

    indices: Tensor
    counts: Tensor
    pooled: Tensor | None

    def public(self, block: BlockShape) -> BlockMap:
        return BlockMap(self.indices, self.counts[..., 1], block)


@triton.jit(do_not_specialize=["nq", "nk", "n_q", "n_k", "heads", "group"])
def _select_kernel(scores, indices, q_similarity, k_similarity, k_count, counts, pooled, per_head,
                   amount, similarity, factor, nq, nk, n_q, n_k, heads, group,
                   TOPK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                   CHUNK: tl.constexpr, BISECTIONS: tl.constexpr):
    """One row of the map. `scores` and `indices` share their memory: the row's list replaces its scores."""
    row = tl.program_id(0).to(tl.int64)
    i, head = (row % nq).to(tl.int32), (row // nq % heads).to(tl.int32)
    keys = (row // nq // heads * (heads // group) + head // group) * nk
    scores += row * nk
    indices += row * nk
    k_similarity += keys
    k_count += keys
    amount = threshold_of(per_head, 0, head, heads, amount)
    theta = threshold_of(per_head, 1, head, heads, similarity)
    whole_row = tl.load(q_similarity + row) < theta

    # Blocks from `diagonal` on are cut by the causal diagonal, blocks from `end` on lie beyond it.
    end = nk
    diagonal = nk
    if CAUSAL:
        end = tl.minimum(nk, (tl.minimum((i + 1) * BLOCK_Q, n_q) - 1) // BLOCK_K + 1)
        diagonal = (i * BLOCK_Q + 1) // BLOCK_K

    # Scores of the blocks that the prediction judges, in log2 units; -inf for all others.
    high = float("-inf")
    low = float("inf")
    n_judged = 0
    n_visible = 0
    for start in range(0, end, CHUNK):
        j = start + tl.arange(0, CHUNK)
        visible = (j < end) & (tl.load(k_count + j, mask=j < end, other=0) > 0)
        judged = visible & (tl.load(k_similarity + j, mask=j < end, other=0.0) >= theta) & (j < diagonal)
        x = tl.where(judged, tl.load(scores + j, mask=judged, other=0.0) * factor, float("-inf"))
        tl.store(scores + j, x, mask=j < end)
        high = tl.maximum(high, tl.max(x, 0))
        low = tl.minimum(low, tl.min(tl.where(judged, x, float("inf")), 0))
        n_judged += tl.sum(judged.to(tl.int32), 0)
        n_visible += tl.sum(visible.to(tl.int32), 0)
    tl.debug_barrier()

    # The largest threshold whose blocks reach the target, by bisection: `low` always reaches it, `above` never.
    if n_judged > 0 and amount < 1.0 and not whole_row:
        if TOPK:
            target = tl.minimum(tl.ceil(amount * n_visible - 1e-3), n_judged.to(tl.float32))
        else:
            target = 0.0
            for start in range(0, end, CHUNK):
                j = start + tl.arange(0, CHUNK)
                x = tl.load(scores + j, mask=j < end, other=float("-inf"))
                target += tl.sum(tl.exp2(x - high), 0)
            target = target * amount
        above = high + tl.maximum(tl.abs(high) * 1e-6, 1e-6)
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + above)
            reached = 0.0
            for start in range(0, end, CHUNK):
                j = start + tl.arange(0, CHUNK)
                x = tl.load(scores + j, mask=j < end, other=float("-inf"))
                weight = tl.where(x >= middle, 1.0, 0.0)
                if not TOPK:
                    weight = tl.where(x >= middle, tl.exp2(x - high), 0.0)
                reached += tl.sum(weight, 0)
            low = tl.where(reached >= target, middle, low)
            above = tl.where(reached >= target, above, middle)

    theta = tl.where(whole_row, float("inf"), theta)  # a row that is computed whole keeps every column by rule
    n_kept = 0
    n_unmasked = nk
    for start in range(0, end, CHUNK):
        j = start + tl.arange(0, CHUNK)
        x = tl.load(scores + j, mask=j < end, other=float("-inf"))
        count = tl.load(k_count + j, mask=j < end, other=0)
        visible = (j < end) & (count > 0)
        ruled = (tl.load(k_similarity + j, mask=j < end, other=0.0) < theta) | (j >= diagonal)
        kept = visible & (ruled | ((x >= low) & (x > float("-inf"))))
        place = n_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        masked = kept & ((count < BLOCK_K) | (j >= diagonal))
        n_unmasked = tl.minimum(n_unmasked, tl.min(tl.where(masked, place, nk), 0))
        if pooled is not None:
            tl.store(pooled + row * nk + j, (visible & (kept == 0)).to(tl.int8), mask=j < end)
        tl.debug_barrier()  # every score of this chunk has been read before its memory takes the list
        tl.store(indices + place, j, mask=kept)
        n_kept += tl.sum(kept.to(tl.int32), 0)
    if pooled is not None:
        for start in range(end // CHUNK * CHUNK, nk, CHUNK):
            j = start + tl.arange(0, CHUNK)
            tl.store(pooled + row * nk + j, tl.zeros([CHUNK], tl.int8), mask=(j >= end) & (j < nk))
    tl.store(counts + row * 3, tl.minimum(n_unmasked, n_kept))
    tl.store(counts + row * 3 + 1, n_kept)
    tl.store(counts + row * 3 + 2, n_visible)


def select_blocks(queries: PreparedQueries, keys: PreparedKeys, *, scale: float, per_head: Tensor | None,
                  thresholds: list[float], selection: str, causal: bool, n_q: int, n_k: int, block: BlockShape,
                  pooled: bool) -> BlockLists:
    """The lists of kept blocks of every query block of every head."""
    batch, heads, nq = queries.similarity.shape
    kv_heads, nk = keys.similarity.shape[1:]
    scores = torch.empty((batch, heads, nq, nk), dtype=torch.float32, device=queries.mean.device)
    torch.bmm(queries.mean.view(batch * kv_heads, -1, queries.mean.shape[-1]), keys.mean.flatten(0, 1).mT,
              out=scores.view(batch * kv_heads, -1, nk))
    lists = BlockLists(indices=scores.view(torch.int32),
                       counts=torch.empty((batch, heads, nq, 3), dtype=torch.int32, device=scores.device),
                       pooled=torch.empty_like(scores, dtype=torch.int8) if pooled else None)
    _select_kernel[(batch * heads * nq,)](
        scores, lists.indices, queries.similarity, keys.similarity, keys.count, lists.counts, lists.pooled, per_head,
        thresholds[0], thresholds[1], scale * LOG2E, nq, nk, n_q, n_k, heads, heads // kv_heads,
        TOPK=selection == "topk", CAUSAL=causal, BLOCK_Q=block.q, BLOCK_K=block.k, CHUNK=_CHUNK,
        BISECTIONS=_BISECTIONS, num_warps=4)
    return lists

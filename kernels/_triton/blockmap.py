"""The block map: predicted scores, then TopCdf or TopK row by row without a sort, in one launch."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, float16, float32, int32

from ..reference import LOG2E
from ..types import BlockMap, BlockShape
from .launch import Region, allocate, launch
from .prepare import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import padded_dim, threshold_of

_ROWS = 16  # query blocks of a program, the least that tensor cores multiply
_CHUNK = 256  # scores of a row that a program looks at together; longer rows take several steps
_BISECTIONS = 26  # leaves 2^-26 of a row's range of scores undecided, below float32's resolution


@dataclass(frozen=True)
class BlockLists:
    """indices int32 (B, H, nq, nk); counts int32 (B, H, nq, 3): how many leading entries need nothing special inside
    their block, how many entries there are, and how many dense attention would have; tail float16 (B, H, nq, nk),
    log2 of the keys that a pooled block stands in for, -inf where it does not, or None."""

    indices: Region
    counts: Region
    tail: Region | None

    def public(self, block: BlockShape) -> BlockMap:
        """The map for the outside, in memory of its own."""
        return BlockMap(self.indices.tensor().clone(), self.counts.tensor()[..., 1].clone(), block)


def allocate_lists(device: torch.device, shape: tuple[int, int, int, int], pooled: bool) -> BlockLists:
    """Room for the lists of a map of this shape."""
    return BlockLists(*allocate(device, (tuple(shape), int32), ((*shape[:3], 3), int32),
                                (tuple(shape), float16) if pooled else None))


@triton.jit
def _chunk_of(scores, at, j, end, ROW_END: tl.constexpr):
    return tl.load(scores + at[:, None] + j[None, :], mask=j[None, :] < end[:, None], other=ROW_END)


@triton.jit(do_not_specialize=["nq", "nk", "n_q", "n_k", "heads", "group"])
def _select_kernel(q_means, k_means, q_similarity, k_similarity, k_count, v_steps, scores, indices, counts, tail,
                   per_head, amount, similarity, factor, nq, nk, n_q, n_k, heads, group,
                   D: tl.constexpr, DP: tl.constexpr, TOPK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PRODUCT: tl.constexpr,
                   BISECTIONS: tl.constexpr):
    """ROWS rows of the map. `scores` and `indices` share their memory: a row's list replaces its scores."""
    tiles = tl.cdiv(nq, ROWS)
    row = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    exists = i < nq
    head = row % heads
    keys = (row // heads * (heads // group) + head // group).to(tl.int64) * nk
    slot = row.to(tl.int64) * nq + i
    at = slot * nk
    cols = tl.arange(0, DP)
    k_similarity += keys
    k_count += keys
    amount = threshold_of(per_head, 0, head, heads, amount)
    theta = threshold_of(per_head, 1, head, heads, similarity)
    whole_row = tl.load(q_similarity + slot, mask=exists, other=0.0) < theta

    # Blocks from `diagonal` on are cut by the causal diagonal, blocks from `end` on lie beyond it.
    end = tl.where(exists, nk, 0)
    diagonal = tl.full([ROWS], nk, tl.int32)
    if CAUSAL:
        end = tl.minimum(end, (tl.minimum((i + 1) * BLOCK_Q, n_q) - 1) // BLOCK_K + 1)
        diagonal = (i * BLOCK_Q + 1) // BLOCK_K
    last = tl.max(end, 0)

    # Scores of the blocks that the prediction judges, in log2 units; -inf for all others.
    q = tl.load(q_means + slot[:, None] * D + cols, mask=exists[:, None] & (cols < D), other=0.0)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    low = tl.full([ROWS], float("inf"), tl.float32)
    n_judged = tl.zeros([ROWS], tl.int32)
    n_visible = tl.zeros([ROWS], tl.int32)
    for start in range(0, last, PRODUCT):
        j = start + tl.arange(0, PRODUCT)
        k = tl.load(k_means + (keys + j)[:, None] * D + cols, mask=(j < nk)[:, None] & (cols < D), other=0.0)
        x = tl.dot(q, tl.trans(k)) * factor  # in TF32 where there is such: a thousandth of a score predicts nothing
        inside = j[None, :] < end[:, None]
        visible = inside & (tl.load(k_count + j, mask=j < nk, other=0) > 0)[None, :]
        alike = tl.load(k_similarity + j, mask=j < nk, other=0.0) >= theta
        judged = visible & alike[None, :] & (j[None, :] < diagonal[:, None])
        x = tl.where(judged, x, float("-inf"))
        tl.store(scores + at[:, None] + j[None, :], x, mask=inside)
        high = tl.maximum(high, tl.max(x, 1))
        low = tl.minimum(low, tl.min(tl.where(judged, x, float("inf")), 1))
        n_judged += tl.sum(judged.to(tl.int32), 1)
        n_visible += tl.sum(visible.to(tl.int32), 1)
    tl.debug_barrier()

    # The largest threshold whose blocks reach the target, by bisection: `low` always reaches it, `above` never. A row
    # is settled when at most one score lies between them.
    if TOPK:
        target = tl.minimum(tl.maximum(tl.ceil(amount * n_visible - 1e-3), 1.0), n_judged.to(tl.float32))
    else:
        target = tl.zeros([ROWS], tl.float32)
        for start in range(0, last, CHUNK):
            x = _chunk_of(scores, at, start + tl.arange(0, CHUNK), end, float("-inf"))
            target += tl.sum(tl.exp2(x - tl.where(n_judged > 0, high, 0.0)[:, None]), 1)
        target = target * amount
    searched = (n_judged > 0) & (tl.where(whole_row, 1.0, amount) < 1.0)
    high = tl.where(searched, high, 0.0)
    low = tl.where(searched, low, 0.0)
    above = high + tl.maximum(tl.abs(high) * 1e-6, 1e-6)
    n_low = n_judged
    n_above = tl.zeros([ROWS], tl.int32)
    step = 0
    undecided = tl.max(tl.where(searched, n_low, 0), 0)
    while undecided > 1:
        middle = 0.5 * (low + above)
        reached = tl.zeros([ROWS], tl.float32)
        n_middle = tl.zeros([ROWS], tl.int32)
        for start in range(0, last, CHUNK):
            x = _chunk_of(scores, at, start + tl.arange(0, CHUNK), end, float("-inf"))
            over = x >= middle[:, None]
            n_middle += tl.sum(over.to(tl.int32), 1)
            if not TOPK:
                reached += tl.sum(tl.where(over, tl.exp2(x - high[:, None]), 0.0), 1)
        if TOPK:
            reached = n_middle.to(tl.float32)
        enough = reached >= target
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        above = tl.where(enough, above, middle)
        n_above = tl.where(enough, n_above, n_middle)
        step += 1
        undecided = tl.where(step < BISECTIONS, tl.max(tl.where(searched, n_low - n_above, 0), 0), 0)

    low = tl.where(searched, low, float("-inf"))
    theta = tl.where(whole_row, float("inf"), theta)  # a row that is computed whole keeps every column by rule
    n_kept = tl.zeros([ROWS], tl.int32)
    n_unmasked = tl.full([ROWS], nk, tl.int32)
    for start in range(0, last, CHUNK):
        j = start + tl.arange(0, CHUNK)
        x = _chunk_of(scores, at, j, end, float("-inf"))
        count = tl.load(k_count + j, mask=j < nk, other=0)
        inside = j[None, :] < end[:, None]
        visible = inside & (count > 0)[None, :]
        alike = tl.load(k_similarity + j, mask=j < nk, other=0.0)
        ruled = (alike[None, :] < theta[:, None]) | (j[None, :] >= diagonal[:, None])
        kept = visible & (ruled | ((x >= low[:, None]) & (x > float("-inf"))))
        place = n_kept[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
        special = (count < BLOCK_K)[None, :] | (j[None, :] >= diagonal[:, None])
        if v_steps is not None:
            special = special | (tl.load(v_steps + keys + j, mask=j < nk, other=1.0) != 1.0)[None, :]
        n_unmasked = tl.minimum(n_unmasked, tl.min(tl.where(kept & special, place, nk), 1))
        if tail is not None:
            weight = tl.where(visible & (kept == 0), tl.log2(tl.maximum(count, 1).to(tl.float32))[None, :],
                              float("-inf"))
            tl.store(tail + at[:, None] + j[None, :], weight.to(tl.float16), mask=inside)
        tl.debug_barrier()  # every score of this chunk has been read before its memory takes the list
        tl.store(indices + at[:, None] + place, tl.broadcast_to(j[None, :], [ROWS, CHUNK]), mask=kept)
        n_kept += tl.sum(kept.to(tl.int32), 1)
    if tail is not None:
        for start in range(tl.min(tl.where(exists, end, nk), 0) // CHUNK * CHUNK, nk, CHUNK):
            j = start + tl.arange(0, CHUNK)
            beyond = exists[:, None] & (j[None, :] >= end[:, None]) & (j < nk)[None, :]
            tl.store(tail + at[:, None] + j[None, :], tl.full([ROWS, CHUNK], float("-inf"), tl.float16), mask=beyond)
    tl.store(counts + slot * 3, tl.minimum(n_unmasked, n_kept), mask=exists)
    tl.store(counts + slot * 3 + 1, n_kept, mask=exists)
    tl.store(counts + slot * 3 + 2, n_visible, mask=exists)


def select_blocks(queries: PreparedQueries, keys: PreparedKeys, values: PreparedValues | None, *, scale: float,
                  per_head: Tensor | None, thresholds: list[float], selection: str, causal: bool, n_q: int, n_k: int,
                  block: BlockShape, pooled: bool) -> BlockLists:
    """The lists of kept blocks of every query block of every head."""
    batch, heads, nq, dim = queries.mean.shape
    kv_heads, nk = keys.similarity.shape[1:]
    device = queries.mean.device
    lists = allocate_lists(device, (batch, heads, nq, nk), pooled)
    scores = lists.indices.view(float32)
    launch(_select_kernel, (batch * heads * -(-nq // _ROWS),), device,
           (queries.mean, keys.mean, queries.similarity, keys.similarity, keys.count, values and values.step, scores,
            lists.indices, lists.counts, lists.tail, per_head, thresholds[0], thresholds[1], scale * LOG2E, nq, nk, n_q,
            n_k, heads, heads // kv_heads),
           dict(D=dim, DP=padded_dim(dim), TOPK=selection == "topk", CAUSAL=causal, BLOCK_Q=block.q, BLOCK_K=block.k,
                ROWS=_ROWS, CHUNK=_CHUNK, PRODUCT=min(64, 8192 // padded_dim(dim), _CHUNK), BISECTIONS=_BISECTIONS),
           dict(num_warps=8, num_stages=2))
    return lists

"""The block map: predicted scores, then TopCdf or TopK row by row without a sort, in one launch."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, float16, float32, int32

from ..formats import LOG2E
from ..types import BlockMap, BlockShape
from .launch import Region, allocate, launch
from .prepare import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import padded_dim, threshold_of

_ROWS = 16  # query blocks of a program, the least that tensor cores multiply
_RESIDENT = 512  # scores of a row that stay in registers while its threshold is sought
_CHUNK = 128  # scores of a row that a program looks at together elsewhere
_UNJUDGED = tl.constexpr(-3e38)  # for the score of a block that a rule keeps; -inf where nothing can be attended


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


# Scores are looked at in tiles [rows, pieces, 32]: Triton then gives whole rows to a warp, so that sums along them need
# no barrier between warps.

@triton.jit
def _columns(start, COUNT: tl.constexpr):
    """`COUNT` columns from `start` on, [1, pieces, 32]."""
    return (start + tl.arange(0, COUNT // 32)[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]


@triton.jit
def _of_rows(x):
    """Values of rows, [rows], beside a tile."""
    return x[:, None, None]


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def _scores_of(scores, at, j, end):
    """Scores of the columns j; -inf beyond the end of a row."""
    return tl.load(scores + _of_rows(at) + j, mask=j < _of_rows(end), other=float("-inf"))


@triton.jit
def _keys_of(x, high, TOPK: tl.constexpr):
    """Scores as integers of the same order: the bits of the scores, or under cdf of their exponentials."""
    if TOPK:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    else:
        return tl.exp2(x - high).to(tl.int32, bitcast=True)


@triton.jit
def _mass_from(keys, threshold, TOPK: tl.constexpr):
    """What the keys that reach the threshold of their row add up to, in probability or in blocks, and their number."""
    over = keys >= _of_rows(threshold)
    count = _sum(over.to(tl.int32))
    if TOPK:
        return count.to(tl.float32), count
    else:
        return _sum(tl.where(over, keys.to(tl.float32, bitcast=True), 0.0)), count


@triton.jit
def _not_alike(similarity, theta):
    """Which blocks the judge finds badly described by their means; NaN is."""
    return (similarity >= theta) == 0


@triton.jit
def _range_of(x):
    """Number of visible blocks of each row, number of judged ones, and the largest and smallest of their scores."""
    judged = x > _UNJUDGED
    low = tl.where(judged, x, float("inf"))
    return (_sum((x > float("-inf")).to(tl.int32)), _sum(judged.to(tl.int32)), tl.max(tl.max(x, 1), 1),
            tl.min(tl.min(low, 1), 1))


@triton.jit(do_not_specialize=["nq", "nk", "n_q", "n_k", "heads", "group"])
def _select_kernel(q_means, k_means, q_similarity, k_similarity, k_count, k_bias, k_biased, v_steps, scores, indices,
                   counts, tail, per_head, amount, similarity, factor, nq, nk, n_q, n_k, heads, group,
                   D: tl.constexpr, DP: tl.constexpr, TOPK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_K: tl.constexpr, ROWS: tl.constexpr, RESIDENT: tl.constexpr, CHUNK: tl.constexpr,
                   PRODUCT: tl.constexpr):
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
    # The judge is for cdf: under topk the share of blocks is fixed, but for what the caller wants exact (-inf).
    theta = -1.0 if TOPK else threshold_of(per_head, 1, head, heads, similarity)
    # A block that holds NaN or infinity has a similarity of NaN and is kept too: the rows that meet it become NaN.
    whole_row = exists & _not_alike(tl.load(q_similarity + slot, mask=exists, other=0.0), theta)

    # Blocks from `diagonal` on are cut by the causal diagonal, blocks from `end` on lie beyond it.
    end = tl.where(exists, nk, 0)
    diagonal = tl.full([ROWS], nk, tl.int32)
    if CAUSAL:
        end = tl.minimum(end, (tl.minimum((i + 1) * BLOCK_Q, n_q) - 1) // BLOCK_K + 1)
        diagonal = (i * BLOCK_Q + 1) // BLOCK_K
    last = tl.max(end, 0)

    # Scores of the blocks that the prediction judges, in log2 units.
    q = tl.load(q_means + slot[:, None] * D + cols, mask=(exists & (whole_row == 0))[:, None] & (cols < D),
                other=0.0)
    for start in range(0, last, PRODUCT):
        j = start + tl.arange(0, PRODUCT)
        k = tl.load(k_means + (keys + j)[:, None] * D + cols, mask=(j < nk)[:, None] & (cols < D), other=0.0)
        x = tl.dot(q, tl.trans(k)) * factor  # in TF32 where there is such: a thousandth of a score predicts nothing
        judged = _not_alike(tl.load(k_similarity + j, mask=j < nk, other=0.0), theta) == 0
        if k_bias is not None:
            extra = tl.load(k_bias + keys + j, mask=j < nk, other=0.0)
            x += extra[None, :]
            judged = judged & (extra == extra)
        x = tl.where(judged[None, :] & (j[None, :] < diagonal[:, None]), x, _UNJUDGED)
        x = tl.where((tl.load(k_count + j, mask=j < nk, other=0) > 0)[None, :], x, float("-inf"))
        tl.store(scores + at[:, None] + j[None, :], x, mask=j[None, :] < end[:, None])
    tl.debug_barrier()

    resident = _scores_of(scores, at, _columns(0, RESIDENT), end)
    n_visible, n_judged, high, low = _range_of(resident)
    for start in range(RESIDENT, last, CHUNK):
        seen, judged, higher, lower = _range_of(_scores_of(scores, at, _columns(start, CHUNK), end))
        n_visible, n_judged = n_visible + seen, n_judged + judged
        high, low = tl.maximum(high, higher), tl.minimum(low, lower)
    high = tl.where(n_judged > 0, high, 0.0)

    # The largest threshold whose blocks reach the target, by bisection: `low` always reaches it, `above` never. A row
    # is settled when at most one key lies between them, or none can.
    searched = (n_judged > 0) & (tl.where(whole_row, 1.0, amount) < 1.0)
    resident = _keys_of(resident, _of_rows(high), TOPK)
    if TOPK:
        target = tl.minimum(tl.maximum(tl.ceil(amount * n_visible - 1e-3), 1.0), n_judged.to(tl.float32))
    else:
        target = _sum(resident.to(tl.float32, bitcast=True))
        for start in range(RESIDENT, last, CHUNK):
            target += _sum(tl.exp2(_scores_of(scores, at, _columns(start, CHUNK), end) - _of_rows(high)))
        target = target * amount
    low = tl.where(searched, _keys_of(low, high, TOPK), 0)
    above = tl.where(searched, _keys_of(high, high, TOPK) + 1, 0)
    n_low = n_judged
    n_above = tl.zeros([ROWS], tl.int32)
    undecided = tl.max(tl.where(above > low + 1, n_low - n_above, 0), 0)
    while undecided > 1:
        middle = (low & above) + ((low ^ above) >> 1)  # the mean, without overflow
        reached, n_middle = _mass_from(resident, middle, TOPK)
        for start in range(RESIDENT, last, CHUNK):
            x = _keys_of(_scores_of(scores, at, _columns(start, CHUNK), end), _of_rows(high), TOPK)
            more, n_more = _mass_from(x, middle, TOPK)
            reached += more
            n_middle += n_more
        enough = reached >= target
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        above = tl.where(enough, above, middle)
        n_above = tl.where(enough, n_above, n_middle)
        undecided = tl.max(tl.where(above > low + 1, n_low - n_above, 0), 0)

    low = _of_rows(tl.where(searched, low, -2147483648))
    n_kept = tl.zeros([ROWS], tl.int32)
    n_unmasked = tl.full([ROWS], nk, tl.int32)
    for start in range(0, last, CHUNK):
        j = _columns(start, CHUNK)
        x = _scores_of(scores, at, j, end)
        visible = x > float("-inf")
        kept = _of_rows(whole_row) | (x <= _UNJUDGED) | (_keys_of(x, _of_rows(high), TOPK) >= low)
        count = tl.load(k_count + j, mask=j < nk, other=0)
        special = (count < BLOCK_K) | (j >= _of_rows(diagonal))
        if v_steps is not None:
            step = tl.load(v_steps + keys + j, mask=j < nk, other=1.0)
            special = special | (step != 1.0)
            kept = kept | (step != step)  # values that are not finite
        if k_biased is not None:
            special = special | (tl.load(k_biased + keys + j, mask=j < nk, other=0) != 0)
        kept = kept & visible
        taken = kept.to(tl.int32)
        n_piece = tl.sum(taken, 2)
        place = tl.cumsum(taken, 2) - 1 + (_of_rows(n_kept) + (tl.cumsum(n_piece, 1) - n_piece)[:, :, None])
        n_unmasked = tl.minimum(n_unmasked, tl.min(tl.min(tl.where(kept & special, place, nk), 1), 1))
        if tail is not None:
            weight = tl.log2(tl.maximum(count, 1).to(tl.float32))
            if k_bias is not None:
                weight += tl.load(k_bias + keys + j, mask=j < nk, other=0.0)
            weight = tl.where(visible & (kept == 0), weight, float("-inf"))
            tl.store(tail + _of_rows(at) + j, weight.to(tl.float16), mask=j < _of_rows(end))
        tl.debug_barrier()  # every score of this chunk has been read before its memory takes the list
        tl.store(indices + _of_rows(at) + place, tl.broadcast_to(j, place.shape), mask=kept)
        n_kept += tl.sum(n_piece, 1)
    if tail is not None:
        for start in range(tl.min(tl.where(exists, end, nk), 0) // CHUNK * CHUNK, nk, CHUNK):
            j = _columns(start, CHUNK)
            beyond = _of_rows(exists) & (j >= _of_rows(end)) & (j < nk)
            tl.store(tail + _of_rows(at) + j, float("-inf"), mask=beyond)
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
           (queries.mean, keys.mean, queries.similarity, keys.similarity, keys.count, keys.mean_bias, keys.biased,
            values and values.step, scores, lists.indices, lists.counts, lists.tail, per_head, thresholds[0],
            thresholds[1], scale * LOG2E, nq, nk, n_q, n_k, heads, heads // kv_heads),
           dict(D=dim, DP=padded_dim(dim), TOPK=selection == "topk", CAUSAL=causal, BLOCK_Q=block.q, BLOCK_K=block.k,
                ROWS=_ROWS, RESIDENT=_RESIDENT, CHUNK=_CHUNK, PRODUCT=min(64, 8192 // padded_dim(dim), _CHUNK)),
           dict(num_warps=8, num_stages=2))
    return lists

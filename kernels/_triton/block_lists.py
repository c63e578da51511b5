"""The lists of kept blocks that the attention kernel walks along, and the rules that both ways to a map share."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import float16, int32

from ..types import BlockMap, BlockShape
from .launch import Region, allocate

# A mean of values fits the float16 of the pooled tail where the scale of their block is at most this: it is a 127th of
# the largest value in INT8, and at least a 256th in float16. Larger means come of samples in which V does not vary.
_MOST_POOLED = tl.constexpr(255.0)


@dataclass(frozen=True)
class BlockLists:
    """A list of kept blocks of K for every block of Q, a row of the map.

    indices: int32 (B, H, q_blocks, k_blocks), kept blocks, ascending; what follows them in a row is undefined.
    counts: int32 (B, H, q_blocks, 3): leading entries that need no special care, see `needs_care`; all entries; blocks
        that dense attention would visit.
    tail: float16 (B, H, q_blocks, k_blocks), what is added in log2 units to the score of a skipped block's pooled key,
        -inf for other blocks; None where skipped blocks are dropped.
    """

    indices: Region
    counts: Region
    tail: Region | None

    def public(self, block: BlockShape) -> BlockMap:
        """The map for the outside, in memory of its own."""
        return BlockMap(self.indices.tensor().clone(), self.counts.tensor()[..., 1].clone(), block)


def allocate_lists(device: torch.device, shape: tuple[int, int, int, int], pooled: bool) -> BlockLists:
    """Room for the lists of a map of shape (B, H, q_blocks, k_blocks)."""
    return BlockLists(*allocate(device, (tuple(shape), int32), ((*shape[:3], 3), int32),
                                (tuple(shape), float16) if pooled else None))


@triton.jit
def causal_limits(q_block, end, q_tokens, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """(diagonal, end) of rows of the map: the first block of K that the causal diagonal cuts, and the first one beyond
    it, at most `end`."""
    last_query = tl.minimum((q_block + 1) * BLOCK_Q, q_tokens) - 1
    end = tl.minimum(end, last_query // BLOCK_K + 1)
    return (q_block * BLOCK_Q + 1) // BLOCK_K, end


@triton.jit
def needs_care(k_block, count, diagonal, v_block_scale, v_plain_scale, biased_ptr, kv_offset, inside,
               BLOCK_K: tl.constexpr):
    """Which blocks the attention kernel can't take in its plain loop: not full of keys, cut by the diagonal, with
    values that are not finite or have a scale above v_plain_scale, or with a bias.

    k_block: of those `inside` the row; count, v_block_scale (or None): theirs; kv_offset: the first block of the head.
    """
    special = (count < BLOCK_K) | (k_block >= diagonal)
    if v_block_scale is not None:
        special = special | ((v_block_scale <= v_plain_scale) == 0)  # NaN too
    if biased_ptr is not None:
        special = special | (tl.load(biased_ptr + kv_offset + k_block, mask=inside, other=0) != 0)
    return special


@triton.jit
def cannot_skip(v_block_scale, tail_ptr):
    """Blocks of values that are not finite, or that the pooled tail, if there is one, can't stand for."""
    most = float("inf") if tail_ptr is None else _MOST_POOLED
    return (v_block_scale <= most) == 0


@triton.jit
def tail_weights(k_block, count, visible, kept, mean_bias_ptr, kv_offset, inside):
    """What is added to the scores of pooled keys, in log2 units: the number of keys that each stands for and their mean
    bias; -inf where the block is not skipped, that is kept or not visible."""
    weight = tl.log2(tl.maximum(count, 1).to(tl.float32))
    if mean_bias_ptr is not None:
        weight += tl.load(mean_bias_ptr + kv_offset + k_block, mask=inside, other=0.0)
    return tl.where(visible & (kept == 0), weight, float("-inf")).to(tl.float16)


@triton.jit
def store_counts(counts_ptr, map_row, n_plain, n_kept, n_visible, exists):
    """A row of BlockLists.counts for each of map_row."""
    tl.store(counts_ptr + map_row * 3, tl.minimum(n_plain, n_kept), mask=exists)
    tl.store(counts_ptr + map_row * 3 + 1, n_kept, mask=exists)
    tl.store(counts_ptr + map_row * 3 + 2, n_visible, mask=exists)

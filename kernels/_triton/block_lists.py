"""The lists of kept blocks that the attention kernel walks along, and the rules that both ways to a map share."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import int32

from ..types import BlockMap, BlockShape
from .launch import Region, allocate


@dataclass(frozen=True)
class BlockLists:
    """A list of kept blocks of K for every block of Q, a row of the map.

    indices: int32 (B, H, q_blocks, k_blocks), kept blocks, ascending; what follows them in a row is undefined.
    counts: int32 (B, H, q_blocks, 3): leading entries that need no special care, see `needs_care`; all entries; blocks
        that dense attention would visit.
    skipped: int32 (B, H, q_blocks, skip_words(k_blocks)), a bit for each block of K, from the lowest of the first word
        on: whether it is skipped and stands in the pooled tail; None where skipped blocks are dropped.
    """

    indices: Region
    counts: Region
    skipped: Region | None

    def public(self, block: BlockShape) -> BlockMap:
        """The map for the outside, in memory of its own."""
        return BlockMap(self.indices.tensor().clone(), self.counts.tensor()[..., 1].clone(), block)


def allocate_lists(device: torch.device, shape: tuple[int, int, int, int], pooled: bool) -> BlockLists:
    """Room for the lists of a map of shape (B, H, q_blocks, k_blocks)."""
    return BlockLists(*allocate(device, (tuple(shape), int32), ((*shape[:3], 3), int32),
                                ((*shape[:3], skip_words(shape[3])), int32) if pooled else None))


def skip_words(k_blocks: int) -> int:
    """Words of 32 bits for a row of BlockLists.skipped: an even number, because attention may take two together."""
    return -(-k_blocks // 64) * 2


@triton.jit
def words_a_row(k_blocks):
    """`skip_words` in a kernel."""
    return tl.cdiv(k_blocks, 64) * 2


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
def cannot_skip(v_block_scale):
    """Blocks of values that are not finite."""
    return (v_block_scale < float("inf")) == 0


@triton.jit
def skip_bits(visible, kept, AXIS: tl.constexpr):
    """Words of BlockLists.skipped, from flags of 32 blocks each along AXIS, the last."""
    place = tl.arange(0, 32)
    place = place[None, :] if AXIS == 1 else place[None, None, :]
    return tl.sum((visible & (kept == 0)).to(tl.int32) << place, AXIS)


@triton.jit
def store_counts(counts_ptr, map_row, n_plain, n_kept, n_visible, exists):
    """A row of BlockLists.counts for each of map_row."""
    tl.store(counts_ptr + map_row * 3, tl.minimum(n_plain, n_kept), mask=exists)
    tl.store(counts_ptr + map_row * 3 + 1, n_kept, mask=exists)
    tl.store(counts_ptr + map_row * 3 + 2, n_visible, mask=exists)

"""The statistics of a call, from the counts of its lists and of the λ test."""
from __future__ import annotations

import triton
import triton.language as tl

from ..formats import ROW_GROUP
from ..types import BlockShape, SpargeStats
from .block_lists import BlockLists
from .launch import Region, launch

_CHUNK = 1024  # rows of the map that a program looks at together


@triton.jit(do_not_specialize=["heads", "q_blocks", "stride_b"])
def _count_kernel(
        # inputs
        counts_ptr, skips_ptr,
        # outputs
        kept_ptr, pv_skipped_ptr,
        # sizes
        heads, q_blocks, stride_b,
        # constants
        ROW_GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """The statistics of one head a program.

    counts_ptr: int32 (B, H, q_blocks, 3), see `BlockLists`. skips_ptr: int32 (B, H, q_blocks), skipped products of row
    groups, or None. Outputs: `SpargeStats`, float32 (B, H) with stride_b elements from one batch entry to the next.
    ROW_GROUPS: of a block of Q.
    """
    batch_head = tl.program_id(0)
    kept = tl.zeros([CHUNK], tl.float32)
    visible = tl.zeros([CHUNK], tl.float32)
    skipped = tl.zeros([CHUNK], tl.float32)
    for start in range(0, q_blocks, CHUNK):
        q_block = start + tl.arange(0, CHUNK)
        exists = q_block < q_blocks
        map_row = batch_head.to(tl.int64) * q_blocks + q_block
        kept += tl.load(counts_ptr + map_row * 3 + 1, mask=exists, other=0).to(tl.float32)
        visible += tl.load(counts_ptr + map_row * 3 + 2, mask=exists, other=0).to(tl.float32)
        if skips_ptr is not None:
            skipped += tl.load(skips_ptr + map_row, mask=exists, other=0).to(tl.float32)
    n_kept = tl.sum(kept, 0)
    place = batch_head // heads * stride_b + batch_head % heads
    tl.store(kept_ptr + place, n_kept / tl.maximum(tl.sum(visible, 0), 1.0))
    tl.store(pv_skipped_ptr + place, tl.sum(skipped, 0) / tl.maximum(n_kept * ROW_GROUPS, 1.0))


def count(lists: BlockLists, skips: Region | None, stats: SpargeStats, block: BlockShape) -> None:
    """Write the statistics of a call. skips: int32 (B, H, q_blocks), the row groups whose P·V was skipped; None where
    none could be."""
    batch, heads, q_blocks, _ = lists.counts.shape
    launch(
        _count_kernel, (batch * heads,), lists.counts.device,
        inputs=dict(counts_ptr=lists.counts, skips_ptr=skips),
        outputs=dict(kept_ptr=stats.kept, pv_skipped_ptr=stats.pv_skipped),
        sizes=dict(heads=heads, q_blocks=q_blocks, stride_b=stats.kept.stride(0)),
        constants=dict(ROW_GROUPS=block.q // ROW_GROUP, CHUNK=_CHUNK),
        options=dict(num_warps=4))

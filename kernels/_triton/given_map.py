"""The lists of kept blocks from a map that the caller gives."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import BlockShape
from .block_lists import (
    BlockLists,
    allocate_lists,
    cannot_skip,
    causal_limits,
    needs_care,
    skip_bits,
    store_counts,
    words_a_row,
)
from .launch import launch
from .prepared import PreparedKeys, PreparedValues

_CHUNK = 1024  # entries of a row that a program looks at together


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_q", "stride_k", "q_blocks", "k_blocks", "q_tokens",
                               "heads", "group"])
def _given_kernel(
        # inputs
        mask_ptr, k_count_ptr, k_biased_ptr, v_block_scale_ptr, v_plain_scale,
        # outputs
        indices_ptr, counts_ptr, skipped_ptr,
        # sizes
        stride_b: tl.int64, stride_h: tl.int64, stride_q: tl.int64, stride_k: tl.int64, q_blocks, k_blocks, q_tokens,
        heads, group,
        # constants
        CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """One row of the map a program: the blocks that the mask keeps and that have anything to attend.

    mask_ptr: bool (B, H, q_blocks, k_blocks) with strides in elements, 0 where it is broadcast.
    k_count_ptr, k_biased_ptr: count and biased of `PreparedKeys`; v_block_scale_ptr and v_plain_scale: of
    `PreparedValues`. Outputs: `BlockLists`.
    """
    map_row = tl.program_id(0).to(tl.int64)
    q_block = (map_row % q_blocks).to(tl.int32)
    head = (map_row // q_blocks % heads).to(tl.int32)
    batch = map_row // q_blocks // heads
    mask_ptr += batch * stride_b + head * stride_h + q_block * stride_q
    kv_offset = (batch * (heads // group) + head // group) * k_blocks
    k_count_ptr += kv_offset
    indices_ptr += map_row * k_blocks

    end = k_blocks
    diagonal = k_blocks
    if CAUSAL:
        diagonal, end = causal_limits(q_block=q_block, end=end, q_tokens=q_tokens, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K)

    n_kept = 0
    n_visible = 0
    n_plain = k_blocks
    for start in range(0, k_blocks, CHUNK):
        k_block = start + tl.arange(0, CHUNK)  # [CHUNK]
        inside = k_block < end
        count = tl.load(k_count_ptr + k_block, mask=inside, other=0)
        visible = count > 0
        kept = visible & (tl.load(mask_ptr + k_block * stride_k, mask=visible, other=0) != 0)
        v_block_scale = tl.load(v_block_scale_ptr + kv_offset + k_block, mask=inside, other=1.0)
        if skipped_ptr is not None:
            kept = kept | visible & cannot_skip(v_block_scale)
        place = n_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        special = kept & needs_care(k_block=k_block, count=count, diagonal=diagonal, v_block_scale=v_block_scale,
                                    v_plain_scale=v_plain_scale, biased_ptr=k_biased_ptr, kv_offset=kv_offset,
                                    inside=inside, BLOCK_K=BLOCK_K)
        n_plain = tl.minimum(n_plain, tl.min(tl.where(special, place, k_blocks), 0))
        tl.store(indices_ptr + place, k_block, mask=kept)
        if skipped_ptr is not None:
            words = words_a_row(k_blocks)
            word = start // 32 + tl.arange(0, CHUNK // 32)
            bits = skip_bits(visible=tl.reshape(visible, [CHUNK // 32, 32]), kept=tl.reshape(kept, [CHUNK // 32, 32]),
                             AXIS=1)
            tl.store(skipped_ptr + map_row * words + word, bits, mask=word < words)
        n_kept += tl.sum(kept.to(tl.int32), 0)
        n_visible += tl.sum(visible.to(tl.int32), 0)
    store_counts(counts_ptr=counts_ptr, map_row=map_row, n_plain=n_plain, n_kept=n_kept, n_visible=n_visible,
                 exists=None)


def lists_from_mask(mask: Tensor, keys: PreparedKeys, values: PreparedValues, *, heads: int, q_tokens: int,
                    causal: bool, block: BlockShape, pooled: bool) -> BlockLists:
    """The lists of a bool mask that broadcasts to (B, H, q_blocks, k_blocks), less blocks with nothing to attend."""
    batch, kv_heads, k_blocks = keys.count.shape
    mask = mask.expand(batch, heads, -(-q_tokens // block.q), k_blocks)
    rows = mask.shape[:3]
    strides = mask.stride()
    lists = allocate_lists(mask.device, mask.shape, pooled)
    launch(
        _given_kernel, (rows.numel(),), mask.device,
        inputs=dict(mask_ptr=mask, k_count_ptr=keys.count, k_biased_ptr=keys.biased,
                    v_block_scale_ptr=values.block_scale, v_plain_scale=values.plain_scale),
        outputs=dict(indices_ptr=lists.indices, counts_ptr=lists.counts, skipped_ptr=lists.skipped),
        sizes=dict(stride_b=strides[0], stride_h=strides[1], stride_q=strides[2], stride_k=strides[3],
                   q_blocks=rows[2], k_blocks=k_blocks, q_tokens=q_tokens, heads=heads, group=heads // kv_heads),
        constants=dict(CAUSAL=causal, BLOCK_Q=block.q, BLOCK_K=block.k, CHUNK=_CHUNK),
        options=dict(num_warps=4))
    return lists

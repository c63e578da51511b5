"""The lists of kept blocks from a map that the caller gives."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import BlockShape
from .blockmap import BlockLists, allocate_lists
from .launch import launch
from .prepare import PreparedKeys, PreparedValues

_CHUNK = 1024  # entries of a row that a program looks at together


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_q", "stride_k", "nq", "nk", "n_q", "heads", "group"])
def _given_kernel(mask, k_count, k_bias, k_biased, v_steps, indices, counts, tail, stride_b: tl.int64,
                  stride_h: tl.int64, stride_q: tl.int64, stride_k: tl.int64, nq, nk, n_q, heads, group,
                  CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """One row of the map."""
    row = tl.program_id(0).to(tl.int64)
    i, head, batch = (row % nq).to(tl.int32), (row // nq % heads).to(tl.int32), row // nq // heads
    mask += batch * stride_b + head * stride_h + i * stride_q
    keys = (batch * (heads // group) + head // group) * nk
    k_count += keys
    indices += row * nk

    # Blocks from `diagonal` on are cut by the causal diagonal, blocks from `end` on lie beyond it.
    end = nk
    diagonal = nk
    if CAUSAL:
        end = tl.minimum(nk, (tl.minimum((i + 1) * BLOCK_Q, n_q) - 1) // BLOCK_K + 1)
        diagonal = (i * BLOCK_Q + 1) // BLOCK_K

    n_kept = 0
    n_visible = 0
    n_unmasked = nk
    for start in range(0, nk, CHUNK):
        j = start + tl.arange(0, CHUNK)
        count = tl.load(k_count + j, mask=j < end, other=0)
        visible = count > 0
        kept = visible & (tl.load(mask + j * stride_k, mask=visible, other=0) != 0)
        place = n_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        step = tl.load(v_steps + keys + j, mask=j < end, other=1.0)
        special = kept & ((count < BLOCK_K) | (j >= diagonal) | (step != 1.0))
        if k_biased is not None:
            special = special | (kept & (tl.load(k_biased + keys + j, mask=j < end, other=0) != 0))
        n_unmasked = tl.minimum(n_unmasked, tl.min(tl.where(special, place, nk), 0))
        tl.store(indices + place, j, mask=kept)
        if tail is not None:
            weight = tl.log2(tl.maximum(count, 1).to(tl.float32))
            if k_bias is not None:
                weight += tl.load(k_bias + keys + j, mask=j < end, other=0.0)
            weight = tl.where(visible & (kept == 0), weight, float("-inf"))
            tl.store(tail + row * nk + j, weight.to(tl.float16), mask=j < nk)
        n_kept += tl.sum(kept.to(tl.int32), 0)
        n_visible += tl.sum(visible.to(tl.int32), 0)
    tl.store(counts + row * 3, tl.minimum(n_unmasked, n_kept))
    tl.store(counts + row * 3 + 1, n_kept)
    tl.store(counts + row * 3 + 2, n_visible)


def lists_from_mask(mask: Tensor, keys: PreparedKeys, values: PreparedValues, *, heads: int, n_q: int, causal: bool,
                    block: BlockShape, pooled: bool) -> BlockLists:
    """The lists of a bool mask that broadcasts to (B, H, nq, nk), less the blocks that nothing can attend."""
    batch, kv_heads, nk = keys.count.shape
    mask = mask.expand(batch, heads, -(-n_q // block.q), nk)
    rows = mask.shape[:3]
    lists = allocate_lists(mask.device, mask.shape, pooled)
    launch(_given_kernel, (rows.numel(),), mask.device,
           (mask, keys.count, keys.mean_bias, keys.biased, values.step, lists.indices, lists.counts, lists.tail,
            *mask.stride(), rows[2], nk, n_q, heads, heads // kv_heads),
           dict(CAUSAL=causal, BLOCK_Q=block.q, BLOCK_K=block.k, CHUNK=_CHUNK), dict(num_warps=4))
    return lists

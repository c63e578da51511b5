"""Device memory of a call: how much its quantised copies take, and groups of heads where that is too much."""
from __future__ import annotations

import torch
from torch import Tensor

from ..types import BlockShape
from .primitives import row_pitch

# Inputs up to this size are taken whole, whatever is free.
SMALL = 256 << 20
# What the copies of a group of heads may take where memory is short, as a share of the bytes of q, k and v.
SHARE = 0.25


def copied_bytes(q: Tensor, k: Tensor, pv_int8: bool, block: BlockShape, pooled: bool) -> int:
    """About the memory that a call takes beyond its inputs and its output, for q (B, H, Nq, D) and k (B, Hkv, Nk, D):
    INT8 copies of q and k, V in its format, means of blocks and the lists of the block map."""
    (batch, heads, q_tokens, dim), (_, kv_heads, k_tokens, _) = q.shape, k.shape
    q_blocks, k_blocks = block.counts(q_tokens, k_tokens)
    pitch = row_pitch(dim)
    by_head = q_blocks * (block.q * (pitch + 4) + 4 * dim + 4 * k_blocks + (k_blocks // 8 if pooled else 0))
    values = block.k * pitch + 4 * dim if pv_int8 else 2 * block.k * pitch
    by_kv_head = k_blocks * (block.k * pitch + 4 * dim + values + (3 * pitch if pooled else 0))
    return batch * (heads * by_head + kv_heads * by_kv_head)


def input_bytes(q: Tensor, k: Tensor) -> int:
    """Bytes of q, k and v."""
    return (q.numel() + 2 * k.numel()) * q.itemsize


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU if none of it lies in fragments."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_short(q: Tensor, k: Tensor, pv_int8: bool, block: BlockShape, pooled: bool) -> bool:
    """Whether the copies of a whole call would take more than half of what is free."""
    if input_bytes(q, k) <= SMALL or q.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    return copied_bytes(q, k, pv_int8, block, pooled) > free_bytes(q.device) // 2


def groups_of_heads(q: Tensor, k: Tensor, pv_int8: bool, block: BlockShape, pooled: bool) -> list[tuple[int, int]]:
    """Ranges of the heads of K whose copies take at most `SHARE` of the inputs; single heads where one takes more."""
    kv_heads = k.shape[1]
    most = int(SHARE * input_bytes(q, k) * kv_heads // copied_bytes(q, k, pv_int8, block, pooled))
    count = -(-kv_heads // max(1, most))
    bounds = [-(-kv_heads * i // count) for i in range(count + 1)]  # the first group is the largest
    return list(zip(bounds, bounds[1:]))


def groups_where_long(q: Tensor, k: Tensor, pv_int8: bool, block: BlockShape, pooled: bool) -> list[tuple[int, int]]:
    """The same where the inputs are large; all heads of others, for which more launches would take longer."""
    return [(0, k.shape[1])] if input_bytes(q, k) <= SMALL else groups_of_heads(q, k, pv_int8, block, pooled)

"""Device memory of a call: how much its quantised copies take, and groups of heads where that is too much."""
from __future__ import annotations

import torch
from torch import Tensor

from ..types import BlockShape
from .primitives import round_up

# Inputs up to this size are taken whole without a look at what is free.
_SMALL = 256 << 20
# Of the bytes of q, k and v: what the copies of a group of heads may take where memory is short.
SHARE = 0.25


def copied_bytes(q: Tensor, k: Tensor, fp8: bool, block: BlockShape, pooled: bool) -> int:
    """About the memory that a call takes beyond its inputs and its output, for q (B, H, Nq, D) and k (B, Hkv, Nk, D):
    INT8 copies of q and k, V in its format, means of blocks and the lists of the block map."""
    (batch, heads, n_q, dim), (_, kv_heads, n_k, _) = q.shape, k.shape
    nq, nk = block.counts(n_q, n_k)
    pitch = round_up(dim, 16)
    a_head_of_q = nq * (block.q * (pitch + 4) + 4 * dim) + nq * nk * (6 if pooled else 4)
    a_head_of_k = nk * (block.k * pitch * (2 if fp8 else 3) + 4 * dim + (3 * pitch if pooled else 0))
    return batch * (heads * a_head_of_q + kv_heads * a_head_of_k)


def input_bytes(q: Tensor, k: Tensor) -> int:
    """Of q, k and v."""
    return (q.numel() + 2 * k.numel()) * q.itemsize


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU, were none of it in fragments."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_short(q: Tensor, k: Tensor, fp8: bool, block: BlockShape, pooled: bool) -> bool:
    """Whether the copies of a whole call would take more than half of what is free."""
    if input_bytes(q, k) <= _SMALL or q.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    return copied_bytes(q, k, fp8, block, pooled) > free_bytes(q.device) // 2


def groups_of_heads(q: Tensor, k: Tensor, fp8: bool, block: BlockShape, pooled: bool) -> list[tuple[int, int]]:
    """Ranges of the heads of K whose copies take at most `SHARE` of the inputs; single heads where one takes more."""
    heads = k.shape[1]
    most = int(SHARE * input_bytes(q, k) * heads // copied_bytes(q, k, fp8, block, pooled))
    count = -(-heads // max(1, most))
    bounds = [heads * i // count for i in range(count + 1)]
    return list(zip(bounds, bounds[1:]))

"""Device memory of a call: how much its quantised copies take, and groups of heads where that is too much."""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..types import BlockShape
from .primitives import round_up

# Copies up to this size are made at once without a look at what is free.
SMALL = 256 << 20
# Of the bytes of q, k and v: what the copies of a group of heads may take where memory is short.
SHARE = 0.25
_Part = TypeVar("_Part")
_log = logging.getLogger(__name__)


def copied_bytes(q: Tensor, k: Tensor, fp8: bool, block: BlockShape, pooled: bool) -> int:
    """About the memory that a call takes beyond its inputs and its output, for q (B, H, Nq, D) and k (B, Hkv, Nk, D):
    INT8 copies of q and k, V in its format, means of blocks and the lists of the block map."""
    (batch, heads, n_q, dim), (_, kv_heads, n_k, _) = q.shape, k.shape
    nq, nk = block.counts(n_q, n_k)
    pitch = round_up(dim, 16)
    a_head_of_q = nq * (block.q * (pitch + 4) + 4 * dim) + nq * nk * (6 if pooled else 4)
    a_head_of_k = nk * (block.k * pitch * (2 if fp8 else 3) + 4 * dim + (3 * pitch if pooled else 0))
    return batch * (heads * a_head_of_q + kv_heads * a_head_of_k)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU, without what fragments make unusable."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def in_groups(attend_heads: Callable[[int, int], _Part], heads: int, copies: int, inputs: int,
              device: torch.device) -> list[_Part]:
    """Results of `attend_heads` of all `heads`: at once, or in groups where `copies` bytes are too many.

    inputs: bytes of q, k and v. Raises torch.OutOfMemoryError where there is no memory even for small groups.
    """
    small_groups = min(heads, -(-copies // max(1, int(SHARE * inputs))))
    plenty = copies <= SMALL or device.type != "cuda" or torch.cuda.is_current_stream_capturing()
    groups = 1 if plenty or copies <= free_bytes(device) // 2 else small_groups
    try:
        return _run(attend_heads, heads, groups)
    except torch.OutOfMemoryError:
        if groups >= small_groups:
            raise
    # Outside the handler: the exception holds the frames, and with them the tensors, of the attempt.
    _log.info("SpargeAttn: memory is short, a call works on %d groups of heads", small_groups)
    return _run(attend_heads, heads, small_groups)


def _run(attend_heads: Callable[[int, int], _Part], heads: int, groups: int) -> list[_Part]:
    bounds = [heads * i // groups for i in range(groups + 1)]
    return [attend_heads(first, last) for first, last in zip(bounds, bounds[1:])]

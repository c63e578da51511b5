"""What a call may be: checks of shapes, dtypes, devices and ranges, never of values on a device.

Every error names the argument, its rule and the value it got.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .call import CallSpec
from .types import Residual, SpargeParams, TokenRanges

LAYOUTS = ("BHND", "BNHD")
PV_DTYPES = ("auto", "int8", "fp16", "fp8")
SKIPPED = ("drop", "pooled")
IMPLEMENTATIONS = ("auto", "triton", "reference")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: str, params: SpargeParams) -> None:
    """Raise where q, k, v and thresholds for their heads make no attention."""
    check_choice("layout", layout, LAYOUTS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have the 4 dimensions {layout}; got shape {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty; got shape {tuple(x.shape)}")
        if not x.is_floating_point() or x.itemsize < 2:
            raise TypeError(f"{name} must be float16, bfloat16 or float32 (float64 for the reference); got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must have the dtype and device of q, {q.dtype} on {q.device}; "
                             f"got {x.dtype} on {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}; got {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must share batch and head_dim with q, {tuple(q.shape)}; got {tuple(k.shape)}")
    axis = layout.index("H")
    heads, kv_heads = q.shape[axis], k.shape[axis]
    if heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's; got {heads} and {kv_heads}")
    if not isinstance(params, SpargeParams):
        raise TypeError(f"params must be SpargeParams; got {type(params).__name__}")
    if params.heads not in (None, heads):
        raise ValueError(f"params must hold one value a head, {heads}; got {params.heads}")


def check_call(call: CallSpec, q: Tensor, k: Tensor, layout: str, impl: str) -> None:
    """Raise where the call has no meaning for checked tensors."""
    token = layout.index("N")
    q_tokens, k_tokens = q.shape[token], k.shape[token]
    if call.scale is not None and not isinstance(call.scale, (int, float)):
        raise TypeError(f"scale must be a number; got {type(call.scale).__name__}")
    if call.scale is not None and not math.isfinite(call.scale):
        raise ValueError(f"scale must be finite; got {call.scale}")
    if call.key_padding_mask is not None:
        _check_padding(call.key_padding_mask, (q.shape[0], k_tokens), q.device)
    if call.key_bias is not None:
        _check_bias(call.key_bias, (q.shape[0], k_tokens), q.device)
    if call.order is not None:
        _check_order(call.order, k.shape[layout.index("H")], q_tokens, k_tokens, call.causal, q.device)
    if call.residual is not None:
        check_residual("residual", call.residual, q, layout)
    _check_ranges("sink_keys", call.sink_keys, k_tokens)
    _check_ranges("dense_queries", call.dense_queries, q_tokens)
    check_choice("pv_dtype", call.pv_dtype, PV_DTYPES)
    check_choice("skipped", call.skipped, SKIPPED)
    check_choice("impl", impl, IMPLEMENTATIONS)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_block_mask(mask: object, batch: int, heads: int, device: torch.device) -> None:
    """Raise where a given map is none of this batch and these heads. How many blocks it needs, its implementation
    says: under torch.compile that is chosen when the op runs."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"block_map must be a BlockMap or a tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"block_map must be bool, True where a block is attended; got {mask.dtype}")
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or mask.device != device:
        raise ValueError(f"block_map must have shape ({batch} or 1, {heads} or 1, nq, nk) on {device}; "
                         f"got {tuple(mask.shape)} on {mask.device}")


def check_dense(dense: object, q: Tensor) -> None:
    """Raise where `dense` is no attention of q."""
    if not isinstance(dense, Tensor):
        raise TypeError(f"dense must be a tensor; got {type(dense).__name__}")
    if dense.shape != q.shape or dense.dtype != q.dtype or dense.device != q.device:
        raise ValueError(f"dense must be like q, {q.dtype} {tuple(q.shape)} on {q.device}; "
                         f"got {dense.dtype} {tuple(dense.shape)} on {dense.device}")


def check_lead(lead: object) -> None:
    """Raise where the lead of a residual is no finite number."""
    if not isinstance(lead, (int, float)):
        raise TypeError(f"lead must be a number; got {type(lead).__name__}")
    if not math.isfinite(lead):
        raise ValueError(f"lead must be finite; got {lead}")


def check_residual(name: str, residual: object, q: Tensor, layout: str) -> None:
    """Raise where an argument is no residual of attention of q."""
    shape, device = tuple(q.shape[layout.index(axis)] for axis in "BHND"), q.device
    if not isinstance(residual, Residual):
        raise TypeError(f"{name} must be a Residual; got {type(residual).__name__}")
    quantised, scale = residual.quantised, residual.scale
    if quantised.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"{name} must hold int8 and float32; got {quantised.dtype} and {scale.dtype}")
    if tuple(quantised.shape) != shape or tuple(scale.shape) != shape[:3]:
        raise ValueError(f"{name} must have shapes {shape} and {shape[:3]}, heads before tokens; "
                         f"got {tuple(quantised.shape)} and {tuple(scale.shape)}")
    if quantised.device != device or scale.device != device:
        raise ValueError(f"{name} must be on {device}; got {quantised.device} and {scale.device}")
    rows, (_, _, tokens, dim) = residual.rows_a_batch, shape
    if quantised.stride() != (rows * dim, tokens * dim, dim, 1) or scale.stride() != (rows, tokens, 1):
        raise ValueError(f"{name} must be contiguous, or batch entries of one that is; "
                         f"got strides {quantised.stride()} and {scale.stride()}")


def _check_padding(mask: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True at padding; got {mask.dtype}")
    if tuple(mask.shape) != shape or mask.device != device:
        raise ValueError(f"key_padding_mask must have shape {shape} on {device}; "
                         f"got {tuple(mask.shape)} on {mask.device}")


def _check_bias(bias: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"key_bias must be a tensor; got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"key_bias must be floating; got {bias.dtype}")
    if tuple(bias.shape) != shape or bias.device != device:
        raise ValueError(f"key_bias must have shape {shape} on {device}; got {tuple(bias.shape)} on {bias.device}")


def _check_order(order: Tensor, kv_heads: int, q_tokens: int, k_tokens: int, causal: bool,
                 device: torch.device) -> None:
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a tensor; got {type(order).__name__}")
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 or int64; got {order.dtype}")
    if q_tokens != k_tokens or causal:
        raise ValueError(f"order needs as many queries as keys and causal=False; "
                         f"got {q_tokens} and {k_tokens}, causal={causal}")
    if tuple(order.shape) not in ((k_tokens,), (kv_heads, k_tokens)) or order.device != device:
        raise ValueError(f"order must have shape ({k_tokens},) or ({kv_heads}, {k_tokens}), one row a key head, on "
                         f"{device}; got {tuple(order.shape)} on {order.device}")


def _check_ranges(name: str, ranges: TokenRanges | None, tokens: int) -> None:
    for item in ranges or ():
        if not isinstance(item, Sequence) or len(item) != 2 or not all(isinstance(end, int) for end in item):
            raise TypeError(f"{name} must hold ranges (start, stop) of integers; got {item!r}")
        start, stop = item
        if not 0 <= start <= stop <= tokens:
            raise ValueError(f"{name} must hold ranges (start, stop) with 0 ≤ start ≤ stop ≤ {tokens}; "
                             f"got {tuple(item)}")

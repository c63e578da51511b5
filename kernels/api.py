"""The public calls: what they mean, checked here; how it is computed is the business of `dispatch`."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import block_of, run, run_map
from .types import BlockMap, BlockShape, SpargeParams, SpargeStats, TokenRanges

LAYOUTS = ("BHND", "BNHD")
PV_DTYPES = ("auto", "fp16", "fp8")
SKIPPED = ("drop", "pooled")
IMPLEMENTATIONS = ("auto", "triton", "reference")


def sparge_attention(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams = SpargeParams(),
                     layout: str = "BHND", scale: float | None = None, causal: bool = False,
                     key_padding_mask: Tensor | None = None, key_bias: Tensor | None = None,
                     order: Tensor | None = None, sink_keys: TokenRanges | None = None,
                     dense_queries: TokenRanges | None = None, pv_dtype: str = "auto", skipped: str = "drop",
                     impl: str = "auto", return_stats: bool = False) -> Tensor | tuple[Tensor, SpargeStats]:
    """Attention that computes only the blocks that matter (SpargeAttn, arXiv 2502.18137).

    For inference: the result carries no gradients, whatever the implementation.

    q: (B, H, Nq, D) float16, bfloat16 or float32; with layout="BNHD", (B, Nq, H, D). Any strides; a last dimension
        that is not contiguous is copied.
    k, v: (B, Hkv, Nk, D) like q; H is a multiple of Hkv (grouped-query attention).
    params: the thresholds (`SpargeParams`); per-head tensors are best kept on q's device.
    scale: factor on QKᵀ; 1/√D by default.
    causal: query i attends keys j ≤ i (aligned at the first token, as scaled_dot_product_attention does).
    key_padding_mask: bool (B, Nk), True where the key is padding and ignored (as nn.MultiheadAttention does). A query
        without any key gives zeros.
    key_bias: floating (B, Nk), added to the scaled scores of a key: the floating mask of
        scaled_dot_product_attention with one row for all queries. A key more than 10000 · ln 2 below the largest of its
        row counts as padding.
    order: int32 or int64 (N,), or (Hkv, N) where heads differ: a permutation of the tokens that puts alike tokens in
        one block. Not checked to be a permutation (that would wait for the device). The output keeps the caller's
        order. Needs Nq = Nk and causal=False.
    sink_keys, dense_queries: ranges (start, stop) of tokens, in the caller's order, that are always attended, or
        always attend everything, in whole blocks.
    pv_dtype: number format of P·V in the fast kernels: "fp16", "fp8", or "auto", which is fp8 where the hardware has
        it (NVIDIA sm89 and newer) and fp16 elsewhere. Q·Kᵀ is INT8. The reference computes exactly with "auto" and
        emulates the format otherwise.
    skipped: "drop" ignores the blocks that are not selected (the paper); "pooled" lets each contribute one pooled
        key and value (Sol-Attn, arXiv 2607.24027).
    impl: "auto", "triton" or "reference"; a name never falls back.
    return_stats: also return `SpargeStats`, left on the device.

    Returns a tensor of q's shape, dtype and layout, contiguous. Raises ValueError or TypeError naming the argument,
    its rule and the value it got; RuntimeError where the implementation asked for by name can't take the call, of which
    `FastPathError` says that its kernels failed to import, compile or launch. NaN or infinity in q, k or v makes at
    least those rows NaN that dense attention makes NaN.
    """
    check_inputs(q, k, v, params=params, layout=layout, scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                 key_bias=key_bias, order=order, sink_keys=sink_keys, dense_queries=dense_queries)
    _check_choice("pv_dtype", pv_dtype, PV_DTYPES)
    _check_choice("skipped", skipped, SKIPPED)
    _check_choice("impl", impl, IMPLEMENTATIONS)
    out, kept, pv_skipped = run(q, k, v, params=params, layout=layout, scale=scale, causal=causal,
                                key_padding_mask=key_padding_mask, key_bias=key_bias, order=order,
                                sink_keys=sink_keys, dense_queries=dense_queries, pv_dtype=pv_dtype, skipped=skipped,
                                impl=impl, return_stats=return_stats)
    return (out, SpargeStats(kept, pv_skipped)) if return_stats else out


def block_map(q: Tensor, k: Tensor, *, params: SpargeParams = SpargeParams(), layout: str = "BHND",
              scale: float | None = None, causal: bool = False, key_padding_mask: Tensor | None = None,
              key_bias: Tensor | None = None, order: Tensor | None = None, sink_keys: TokenRanges | None = None,
              dense_queries: TokenRanges | None = None, pv_dtype: str = "auto", impl: str = "auto") -> BlockMap:
    """The block map that `sparge_attention` predicts for these arguments, for looking at and for tuning.

    `pv_dtype` matters because the block shape of the fast kernels depends on it.
    """
    check_inputs(q, k, k, params=params, layout=layout, scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                 key_bias=key_bias, order=order, sink_keys=sink_keys, dense_queries=dense_queries)
    _check_choice("pv_dtype", pv_dtype, PV_DTYPES)
    _check_choice("impl", impl, IMPLEMENTATIONS)
    return run_map(q, k, params=params, layout=layout, scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                   key_bias=key_bias, order=order, sink_keys=sink_keys, dense_queries=dense_queries, pv_dtype=pv_dtype,
                   impl=impl)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap | Tensor, *, layout: str = "BHND",
                           scale: float | None = None, causal: bool = False, key_padding_mask: Tensor | None = None,
                           key_bias: Tensor | None = None, order: Tensor | None = None, pv_dtype: str = "auto",
                           pv_threshold: float = math.inf, skipped: str = "drop", impl: str = "auto",
                           return_stats: bool = False) -> Tensor | tuple[Tensor, SpargeStats]:
    """Quantised attention over the blocks that the caller chose.

    block_map: a `BlockMap` whose block is `block_shape(q, …)`, or a bool tensor (B or 1, H or 1, nq, nk), True where
        the block of queries attends the block of keys; blocks are counted in the order used for blocking. Blocks
        beyond the causal diagonal and blocks of padding alone are ignored; inside the others the diagonal and padding
        are masked exactly. A query that may attend nothing gives zeros.
    pv_threshold: a row group skips the P·V of a block whose probabilities are all below 2^-pv_threshold.

    All other arguments, the result and the errors are those of `sparge_attention`.
    """
    params = SpargeParams(topk=1.0, similarity_threshold=-1.0, pv_threshold=pv_threshold)
    check_inputs(q, k, v, params=params, layout=layout, scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                 key_bias=key_bias, order=order, sink_keys=None, dense_queries=None)
    _check_choice("pv_dtype", pv_dtype, PV_DTYPES)
    _check_choice("skipped", skipped, SKIPPED)
    _check_choice("impl", impl, IMPLEMENTATIONS)
    block = ()
    if isinstance(block_map, BlockMap):
        block, block_map = (block_map.block.q, block_map.block.k), block_map.mask()
    _check_block_mask(block_map, q.shape[0], q.shape[1 if layout == "BHND" else 2], q.device)
    out, kept, pv_skipped = run(q, k, v, params=params, layout=layout, scale=scale, causal=causal,
                                key_padding_mask=key_padding_mask, key_bias=key_bias, order=order, sink_keys=None,
                                dense_queries=None, pv_dtype=pv_dtype, skipped=skipped, impl=impl,
                                return_stats=return_stats, block_mask=block_map, block=block)
    return (out, SpargeStats(kept, pv_skipped)) if return_stats else out


def block_shape(q: Tensor, *, pv_dtype: str = "auto", impl: str = "auto") -> BlockShape:
    """The blocks that a call with q (…, D) works in: tokens of Q and of K in one entry of its map."""
    _check_choice("pv_dtype", pv_dtype, PV_DTYPES)
    _check_choice("impl", impl, IMPLEMENTATIONS)
    return block_of(q, pv_dtype, impl)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams, layout: str, scale: float | None,
                 causal: bool, key_padding_mask: Tensor | None, key_bias: Tensor | None, order: Tensor | None,
                 sink_keys: TokenRanges | None, dense_queries: TokenRanges | None) -> None:
    """Raise where a call has no meaning. Looks at shapes, dtypes and devices, never at values on a device."""
    _check_choice("layout", layout, LAYOUTS)
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
    head, token = (1, 2) if layout == "BHND" else (2, 1)
    heads, n_q, n_k = q.shape[head], q.shape[token], k.shape[token]
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}; got {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must share batch and head_dim with q, {tuple(q.shape)}; got {tuple(k.shape)}")
    if heads % k.shape[head]:
        raise ValueError(f"q's heads must be a multiple of k's; got {heads} and {k.shape[head]}")
    if not isinstance(params, SpargeParams):
        raise TypeError(f"params must be SpargeParams; got {type(params).__name__}")
    if params.heads not in (None, heads):
        raise ValueError(f"params must hold one value a head, {heads}; got {params.heads}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number; got {type(scale).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, (q.shape[0], n_k), q.device)
    if key_bias is not None:
        _check_bias(key_bias, (q.shape[0], n_k), q.device)
    if order is not None:
        _check_order(order, k.shape[head], n_q, n_k, causal, q.device)
    _check_ranges("sink_keys", sink_keys, n_k)
    _check_ranges("dense_queries", dense_queries, n_q)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_mask(mask: Tensor, shape: tuple[int, int], device: torch.device) -> None:
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


def _check_block_mask(mask: Tensor, batch: int, heads: int, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"block_map must be a BlockMap or a tensor; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"block_map must be bool, True where a block is attended; got {mask.dtype}")
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or mask.device != device:
        raise ValueError(f"block_map must have shape ({batch} or 1, {heads} or 1, nq, nk) on {device}; "
                         f"got {tuple(mask.shape)} on {mask.device}")


def _check_order(order: Tensor, heads: int, n_q: int, n_k: int, causal: bool, device: torch.device) -> None:
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a tensor; got {type(order).__name__}")
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 or int64; got {order.dtype}")
    if n_q != n_k or causal:
        raise ValueError(f"order needs as many queries as keys and causal=False; "
                         f"got {n_q} and {n_k}, causal={causal}")
    if tuple(order.shape) not in ((n_k,), (heads, n_k)) or order.device != device:
        raise ValueError(f"order must have shape ({n_k},) or ({heads}, {n_k}), one row a key head, on {device}; "
                         f"got {tuple(order.shape)} on {order.device}")


def _check_ranges(name: str, ranges: TokenRanges | None, n: int) -> None:
    for item in ranges or ():
        if not isinstance(item, Sequence) or len(item) != 2 or not all(isinstance(end, int) for end in item):
            raise TypeError(f"{name} must hold ranges (start, stop) of integers; got {item!r}")
        start, stop = item
        if not 0 <= start <= stop <= n:
            raise ValueError(f"{name} must hold ranges (start, stop) with 0 ≤ start ≤ stop ≤ {n}; got {tuple(item)}")

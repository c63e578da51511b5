"""The public calls: what their arguments mean. Each is checked, becomes a `CallSpec` and goes to an implementation."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from . import dispatch, ops
from ._triton import replay
from .call import CallSpec, Thresholds, inputs_of
from .inputs import (
    IMPLEMENTATIONS,
    PV_DTYPES,
    check_block_mask,
    check_call,
    check_choice,
    check_dense,
    check_lead,
    check_residual,
    check_tensors,
)
from .types import BlockMap, BlockShape, Residual, SpargeParams, TokenRanges


def sparge_attention(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams = SpargeParams(),
                     layout: str = "BHND", scale: float | None = None, causal: bool = False,
                     key_padding_mask: Tensor | None = None, key_bias: Tensor | None = None,
                     order: Tensor | None = None, sink_keys: TokenRanges | None = None,
                     dense_queries: TokenRanges | None = None, pv_dtype: str = "auto", skipped: str = "drop",
                     residual: Residual | None = None, impl: str = "auto", return_stats: bool = False,
                     return_lse: bool = False, overwrite_v: bool = False) -> Tensor | tuple:
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
    order: int32 or int64 (N,), or (Hkv, N) where heads differ: a permutation of the tokens that puts similar tokens
        into one block. Not checked to be a permutation (that would wait for the device). The output keeps the caller's
        order. Needs Nq = Nk and causal=False.
    sink_keys, dense_queries: ranges (start, stop) of tokens, in the caller's order, that are always attended, or
        always attend everything, in whole blocks.
    pv_dtype: number format of P·V in the fast kernels: "int8", "fp16", or "auto", which is int8 on NVIDIA's GPUs up to
        head_dim 128 with Triton 3.4 or newer, on an A100 beyond head_dim 64, and fp16 elsewhere. "fp8", which earlier
        releases had, is int8 now. Q·Kᵀ is INT8. The reference computes exactly with "auto" and emulates the format
        otherwise.
    skipped: "drop" ignores the blocks that are not selected (the paper); "pooled" lets each contribute one pooled
        key and value (Sol-Attn, arXiv 2607.24027).
    residual: added to the result: what `attention_residual` of similar q, k and v says that it lacks. Between sampling
        steps it changes more slowly than attention does (DiTFastAttn, arXiv 2406.08552).
    impl: "auto", "triton" or "reference"; a name never falls back.
    return_stats: also return `SpargeStats`, left on the device.
    return_lse: also return the log-sum-exp of each row: the natural logarithm of the sum of the exponentials of the
        scaled scores that were attended, float32 (B, H, Nq), -inf for a query without any key. With it, results over
        parts of the keys can be merged.
    overwrite_v: let the fast kernels write the result over v, with less memory than dense attention takes. The result
        then is v. They do so where v is like q, without gaps and in other memory, and return_lse is off.

    Returns a tensor of q's shape, dtype and layout, contiguous unless it is v; where more is asked for, a tuple of it,
    the statistics and the log-sum-exp, in this order. Raises ValueError or TypeError naming the argument, its rule and
    the value it got; RuntimeError where the implementation asked for by name can't take the call, of which
    `FastPathError` says that its kernels failed to import, compile or launch, and where overwrite_v has cost v and
    something fails, such as memory. NaN or infinity in q, k or v makes at least those rows NaN that dense attention
    makes NaN.
    """
    form = None
    if _may_repeat(params, key_bias, residual, impl) and not (return_lse or overwrite_v):
        tensors = inputs_of(q, k, v, order, key_padding_mask, params.per_head, residual)
        form = replay.form_of(tensors, (layout, scale, causal, sink_keys, dense_queries, pv_dtype, skipped, impl,
                                        return_stats, params.selection, params.numbers))
        repeated = replay.repeat(form, tensors)
        if repeated is not None:
            return repeated
    check_tensors(q, k, v, layout, params)
    call = CallSpec(Thresholds.of(params, q.device), scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                    key_bias=key_bias, order=order, sink_keys=sink_keys, dense_queries=dense_queries,
                    pv_dtype=pv_dtype, skipped=skipped, return_stats=return_stats, return_lse=return_lse,
                    residual=residual, form=form)
    check_call(call, q, k, layout, impl)
    return _attention(q, k, v, call, layout, impl, overwrite_v)


def attention_residual(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, *, params: SpargeParams = SpargeParams(),
                       layout: str = "BHND", scale: float | None = None, causal: bool = False,
                       key_padding_mask: Tensor | None = None, key_bias: Tensor | None = None,
                       order: Tensor | None = None, sink_keys: TokenRanges | None = None,
                       dense_queries: TokenRanges | None = None, pv_dtype: str = "auto", skipped: str = "drop",
                       earlier: Residual | None = None, lead: float = 0.0, impl: str = "auto") -> Residual:
    """What dense attention has beyond `sparge_attention` with the same arguments, for later calls to add.

    dense: attention of q, k and v, like q. Where it or the sparse result is not finite, the residual is zero.
    earlier, lead: a residual of earlier q, k and v, and how far beyond this one the line from there is followed, as a
        share of their distance. Without `earlier`, `lead` has no effect.

    All other arguments and the errors are those of `sparge_attention`. The result takes D + 4 bytes a row of q, and as
    much time as the sparse call. Not for use inside torch.compile.
    """
    form = None
    if _may_repeat(params, key_bias, earlier, impl):
        tensors = (*inputs_of(q, k, v, order, key_padding_mask, params.per_head, earlier), dense)
        form = replay.form_of(tensors, ("residual", layout, scale, causal, sink_keys, dense_queries, pv_dtype, skipped,
                                        impl, lead, params.selection, params.numbers))
        repeated = replay.repeat(form, tensors)
        if repeated is not None:
            return repeated
    check_tensors(q, k, v, layout, params)
    check_dense(dense, q)
    if earlier is not None:
        check_residual("earlier", earlier, q, layout)
    check_lead(lead)
    call = CallSpec(Thresholds.of(params, q.device), scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                    key_bias=key_bias, order=order, sink_keys=sink_keys, dense_queries=dense_queries,
                    pv_dtype=pv_dtype, skipped=skipped, residual=earlier, lead=float(lead), form=form)
    check_call(call, q, k, layout, impl)
    return dispatch.residual(_plain(q), _plain(k), _plain(v), _plain(dense), call, layout, impl)


def block_map(q: Tensor, k: Tensor, *, params: SpargeParams = SpargeParams(), layout: str = "BHND",
              scale: float | None = None, causal: bool = False, key_padding_mask: Tensor | None = None,
              key_bias: Tensor | None = None, order: Tensor | None = None, sink_keys: TokenRanges | None = None,
              dense_queries: TokenRanges | None = None, pv_dtype: str = "auto", impl: str = "auto") -> BlockMap:
    """The block map that `sparge_attention` predicts for these arguments, for looking at and for tuning.

    `pv_dtype` matters because the block shape of the fast kernels depends on it.
    """
    check_tensors(q, k, k, layout, params)
    call = CallSpec(Thresholds.of(params, q.device), scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                    key_bias=key_bias, order=order, sink_keys=sink_keys, dense_queries=dense_queries,
                    pv_dtype=pv_dtype)
    check_call(call, q, k, layout, impl)
    return dispatch.predict(_plain(q), _plain(k), call, layout, impl)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap | Tensor, *, layout: str = "BHND",
                           scale: float | None = None, causal: bool = False, key_padding_mask: Tensor | None = None,
                           key_bias: Tensor | None = None, order: Tensor | None = None, pv_dtype: str = "auto",
                           pv_threshold: float = math.inf, skipped: str = "drop", impl: str = "auto",
                           return_stats: bool = False, return_lse: bool = False) -> Tensor | tuple:
    """Quantised attention over the blocks that the caller chose.

    block_map: a `BlockMap` whose block is `block_shape(q, …)`, or a bool tensor (B or 1, H or 1, q_blocks, k_blocks),
        True where the block of queries attends the block of keys; blocks are counted in the order used for blocking.
        Blocks beyond the causal diagonal and blocks of padding alone are ignored; inside the others the diagonal and
        padding are masked exactly. A query that may attend nothing gives zeros.
    pv_threshold: a row group skips the P·V of a block whose probabilities are all below 2^-pv_threshold.

    All other arguments, the result and the errors are those of `sparge_attention`.
    """
    params = SpargeParams(topk=1.0, similarity_threshold=-1.0, pv_threshold=pv_threshold)
    check_tensors(q, k, v, layout, params)
    given = isinstance(block_map, BlockMap)
    mask, mask_block = (block_map.mask(), block_map.block) if given else (block_map, None)
    call = CallSpec(Thresholds.of(params, q.device), scale=scale, causal=causal, key_padding_mask=key_padding_mask,
                    key_bias=key_bias, order=order, pv_dtype=pv_dtype, skipped=skipped, return_stats=return_stats,
                    return_lse=return_lse, block_mask=mask, mask_block=mask_block)
    check_call(call, q, k, layout, impl)
    check_block_mask(mask, q.shape[0], q.shape[layout.index("H")], q.device)
    return _attention(q, k, v, call, layout, impl)


def block_shape(q: Tensor, *, pv_dtype: str = "auto", impl: str = "auto") -> BlockShape:
    """The blocks that a call with q (…, D) works in: tokens of Q and of K in one entry of its map."""
    check_choice("pv_dtype", pv_dtype, PV_DTYPES)
    check_choice("impl", impl, IMPLEMENTATIONS)
    return dispatch.block_of(q, pv_dtype, impl)


def _may_repeat(params: SpargeParams, key_bias: Tensor | None, residual: Residual | None, impl: str) -> bool:
    """Whether the launches of a call, unchecked as yet, may be those of an earlier one."""
    return (key_bias is None and impl != "reference" and isinstance(params, SpargeParams)
            and isinstance(residual, Residual | None) and not torch.compiler.is_compiling())


def _attention(q: Tensor, k: Tensor, v: Tensor, call: CallSpec, layout: str, impl: str,
               overwrite_v: bool = False) -> Tensor | tuple:
    """The result of a checked call: directly in eager mode, as one op of the graph under torch.compile."""
    q, k, v = (_plain(x) for x in (q, k, v))
    if torch.compiler.is_compiling():  # an op that overwrites nothing
        out, *more = ops.attention(q, k, v, call, layout, impl)
    else:
        out, *more = dispatch.attention(q, k, v, call, layout, impl, overwrite_v)
    wanted = [x for x in more if x is not None]
    return (out, *wanted) if wanted else out


def _plain(x: Tensor) -> Tensor:
    """x without gradients, and waited for: what torch's collectives return has no memory of its own yet."""
    arrived = getattr(x, "trigger_wait", None)
    x = x if arrived is None else arrived()
    return x.detach() if x.requires_grad else x

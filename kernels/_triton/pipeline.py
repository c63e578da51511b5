"""The fast path of a call: prepare → map → attend. Nothing here waits for the device."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..capability import FP8_NEEDS, arch_of, supports_fp8
from ..formats import LOG2E, ROW_GROUP
from ..reference import centred_bias
from ..types import BlockMap, BlockShape, TokenRanges
from .attend import attend
from .block_lists import BlockLists
from .blockmap import select_blocks
from .config import AttendConfig, attend_config
from .given_map import lists_from_mask
from .memory import groups_of_heads, is_short
from .prepare_keys import prepare_keys
from .prepare_queries import prepare_queries
from .prepared import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import padded_dim


def _on_its_device(run: Callable) -> Callable:
    """Make the GPU that holds q the current one, on which Triton launches."""
    @functools.wraps(run)
    def guarded(q: Tensor, *args, **kwargs):
        with torch.cuda.device_of(q):
            return run(q, *args, **kwargs)
    return guarded


@_on_its_device
def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, pv_dtype: str, order: Tensor | None,
              key_padding_mask: Tensor | None, per_head: Tensor | None, key_bias: Tensor | None = None,
              block_mask: Tensor | None = None, **call) -> tuple[Tensor | None, Tensor | None]:
    """`sparge_attention` of q (B, H, Nq, D), k, v (B, Hkv, Nk, D) into out like q; (kept, pv_skipped) if asked.

    `block_mask`, bool (B or 1, H or 1, nq, nk), takes the place of the predicted map. Heads are taken in groups where
    memory is short.
    """
    config, fp8 = _configure(q, pv_dtype)
    bias, padding = _bias_and_padding(key_bias, key_padding_mask, call["causal"])
    call |= dict(config=config, fp8=fp8, bias=bias, padding=padding)
    size = q, k, fp8, config.block, call["skipped"] == "pooled"
    if not is_short(*size):
        try:
            return _attention(q, k, v, out, order=order, per_head=per_head, block_mask=block_mask, **call)
        except torch.OutOfMemoryError:
            pass  # what the attempt held is free once this handler is left
    group = q.shape[1] // k.shape[1]
    parts = []
    for first, last in groups_of_heads(*size):
        of_keys, of_queries = slice(first, last), slice(first * group, last * group)
        parts.append(_attention(
            q[:, of_queries], k[:, of_keys], v[:, of_keys], out[:, of_queries],
            order=order if order is None or order.ndim == 1 else order[of_keys],
            per_head=None if per_head is None else per_head[:, of_queries].contiguous(),
            block_mask=block_mask if block_mask is None or block_mask.shape[1] == 1 else block_mask[:, of_queries],
            **call))
    return tuple(None if part[0] is None else torch.cat(part, 1) for part in zip(*parts))


def _attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, config: AttendConfig, fp8: bool, order: Tensor | None,
               per_head: Tensor | None, thresholds: list[float], causal: bool, skipped: str, return_stats: bool,
               **call) -> tuple[Tensor | None, Tensor | None]:
    order = None if order is None else order.contiguous()
    queries, keys, values, lists = _prepare(q, k, v, config=config, fp8=fp8, pooled=skipped == "pooled", order=order,
                                            per_head=per_head, thresholds=thresholds, causal=causal, **call)
    skips = attend(queries, keys, values, lists, out, k_tokens=k.shape[2], order=order, per_head=per_head,
                   pv_threshold=thresholds[2], causal=causal, config=config, count_skips=return_stats)
    if not return_stats:
        return None, None
    _, n_kept, n_visible = lists.counts.tensor().sum(2, dtype=torch.float32).unbind(-1)
    kept = n_kept / n_visible.clamp(min=1)
    if skips is None:
        return kept, torch.zeros_like(kept)
    return kept, skips.sum(-1) / (n_kept * (config.block.q // ROW_GROUP)).clamp(min=1)


@_on_its_device
def predict(q: Tensor, k: Tensor, *, per_head: Tensor | None, thresholds: list[float], selection: str,
            scale: float | None, causal: bool, key_padding_mask: Tensor | None, key_bias: Tensor | None,
            order: Tensor | None, sink_keys: TokenRanges | None, dense_queries: TokenRanges | None,
            pv_dtype: str) -> BlockMap:
    """The block map alone."""
    config, _ = _configure(q, pv_dtype)
    bias, padding = _bias_and_padding(key_bias, key_padding_mask, causal)
    lists = _prepare(q, k, None, config=config, fp8=False, pooled=False, per_head=per_head, thresholds=thresholds,
                     selection=selection, scale=scale, causal=causal, padding=padding, bias=bias,
                     order=None if order is None else order.contiguous(), sink_keys=sink_keys,
                     dense_queries=dense_queries)[-1]
    return lists.public(config.block)


def block_of(q: Tensor, pv_dtype: str) -> BlockShape:
    """The block shape of a call with q (…, D)."""
    return _configure(q, pv_dtype)[0].block


def _configure(q: Tensor, pv_dtype: str) -> tuple[AttendConfig, bool]:
    arch = arch_of(q.device)
    fp8 = pv_dtype == "fp8" or (pv_dtype == "auto" and supports_fp8(arch))
    if fp8 and not supports_fp8(arch):
        raise RuntimeError(f"pv_dtype='fp8' needs {FP8_NEEDS}; got {arch}")
    return attend_config(arch, padded_dim(q.shape[-1]), fp8), fp8


def _prepare(q: Tensor, k: Tensor, v: Tensor | None, *, config: AttendConfig, fp8: bool, pooled: bool,
             per_head: Tensor | None, thresholds: list[float], selection: str, scale: float | None, causal: bool,
             padding: Tensor | None, bias: Tensor | None, order: Tensor | None, sink_keys: TokenRanges | None,
             dense_queries: TokenRanges | None, block_mask: Tensor | None = None,
             ) -> tuple[PreparedQueries, PreparedKeys, PreparedValues | None, BlockLists]:
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, statistics = prepare_queries(q, k, v, factor=scale * LOG2E, order=order, flags=_flags(dense_queries, q),
                                          padding=padding, block=config.block)
    keys, values = prepare_keys(k, v, statistics, order=order, flags=_flags(sink_keys, k), padding=padding,
                                block=config.block, fp8=fp8, pooled=pooled, bias=bias)
    if block_mask is not None:
        return queries, keys, values, lists_from_mask(
            block_mask, keys, values, heads=q.shape[1], q_tokens=q.shape[2], causal=causal, block=config.block,
            pooled=pooled)
    lists = select_blocks(queries, keys, values, scale=scale, per_head=per_head, thresholds=thresholds,
                          selection=selection, causal=causal, q_tokens=q.shape[2], block=config.block, pooled=pooled)
    return queries, keys, values, lists


def _bias_and_padding(bias: Tensor | None, padding: Tensor | None,
                      causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """The bias of keys, float32 (B, N) in log2 units with 0 as a row's largest, and bool (B, N), keys to ignore."""
    if bias is None:
        return None, None if padding is None else padding.contiguous()
    bias, hidden = centred_bias(bias.float(), padding, causal)
    return bias.contiguous(), hidden.contiguous()


def _flags(ranges: TokenRanges | None, x: Tensor) -> Tensor | None:
    """int8 (N,), 1 inside the token ranges; None where there are none."""
    if not ranges:
        return None
    flags = torch.zeros(x.shape[2], dtype=torch.int8, device=x.device)
    for start, stop in ranges:
        flags[start:stop] = 1
    return flags

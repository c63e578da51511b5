"""The fast path of a call: prepare → map → attend. Nothing here waits for the device."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..capability import arch_of, supports_fp8
from ..reference import LOG2E, ROW_GROUP
from ..types import BlockMap, BlockShape, TokenRanges
from .attend import attend
from .blockmap import BlockLists, select_blocks
from .config import AttendConfig, attend_config
from .given_map import lists_from_mask
from .prepare import PreparedKeys, PreparedQueries, PreparedValues, prepare_keys, prepare_queries
from .primitives import padded_dim


def _on_its_device(run: Callable) -> Callable:
    """Make the GPU that holds q the current one, on which Triton launches."""
    @functools.wraps(run)
    def guarded(q: Tensor, *args, **kwargs):
        with torch.cuda.device_of(q):
            return run(q, *args, **kwargs)
    return guarded


@_on_its_device
def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, per_head: Tensor | None, thresholds: list[float],
              selection: str, scale: float | None, causal: bool, key_padding_mask: Tensor | None,
              order: Tensor | None, sink_keys: TokenRanges | None, dense_queries: TokenRanges | None, pv_dtype: str,
              skipped: str, return_stats: bool, block_mask: Tensor | None = None,
              ) -> tuple[Tensor | None, Tensor | None]:
    """`sparge_attention` of q (B, H, Nq, D), k, v (B, Hkv, Nk, D) into out like q; (kept, pv_skipped) if asked.

    `block_mask`, bool (B or 1, H or 1, nq, nk), takes the place of the predicted map.
    """
    config, fp8 = _configure(q, pv_dtype)
    queries, keys, values, lists = _prepare(
        q, k, v, config=config, fp8=fp8, pooled=skipped == "pooled", per_head=per_head, thresholds=thresholds,
        selection=selection, scale=scale, causal=causal, key_padding_mask=key_padding_mask, order=order,
        sink_keys=sink_keys, dense_queries=dense_queries, block_mask=block_mask)
    skips = attend(queries, keys, values, lists, out, n_k=k.shape[2], order=order, per_head=per_head,
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
            scale: float | None, causal: bool, key_padding_mask: Tensor | None, order: Tensor | None,
            sink_keys: TokenRanges | None, dense_queries: TokenRanges | None, pv_dtype: str) -> BlockMap:
    """The block map alone."""
    config, _ = _configure(q, pv_dtype)
    lists = _prepare(q, k, None, config=config, fp8=False, pooled=False, per_head=per_head, thresholds=thresholds,
                     selection=selection, scale=scale, causal=causal, key_padding_mask=key_padding_mask, order=order,
                     sink_keys=sink_keys, dense_queries=dense_queries)[-1]
    return lists.public(config.block)


def block_of(q: Tensor, pv_dtype: str) -> BlockShape:
    """The block shape of a call with q (…, D)."""
    return _configure(q, pv_dtype)[0].block


def _configure(q: Tensor, pv_dtype: str) -> tuple[AttendConfig, bool]:
    arch = arch_of(q.device)
    fp8 = pv_dtype == "fp8" or (pv_dtype == "auto" and supports_fp8(arch))
    return attend_config(arch, padded_dim(q.shape[-1]), fp8), fp8


def _prepare(q: Tensor, k: Tensor, v: Tensor | None, *, config: AttendConfig, fp8: bool, pooled: bool,
             per_head: Tensor | None, thresholds: list[float], selection: str, scale: float | None, causal: bool,
             key_padding_mask: Tensor | None, order: Tensor | None, sink_keys: TokenRanges | None,
             dense_queries: TokenRanges | None, block_mask: Tensor | None = None,
             ) -> tuple[PreparedQueries, PreparedKeys, PreparedValues | None, BlockLists]:
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order = None if order is None else order.contiguous()
    padding = None if key_padding_mask is None else key_padding_mask.contiguous()
    queries = prepare_queries(q, k, v, factor=scale * LOG2E, order=order, flags=_flags(dense_queries, q),
                              padding=padding, block=config.block)
    keys, values = prepare_keys(k, v, queries, order=order, flags=_flags(sink_keys, k), padding=padding,
                                block=config.block, fp8=fp8, pooled=pooled)
    if block_mask is not None:
        return queries, keys, values, lists_from_mask(block_mask, keys, values, heads=q.shape[1], n_q=q.shape[2],
                                                      causal=causal, block=config.block, pooled=pooled)
    lists = select_blocks(queries, keys, values, scale=scale, per_head=per_head, thresholds=thresholds,
                          selection=selection, causal=causal, n_q=q.shape[2], n_k=k.shape[2], block=config.block,
                          pooled=pooled)
    return queries, keys, values, lists


def _flags(ranges: TokenRanges | None, x: Tensor) -> Tensor | None:
    """int8 (N,), 1 inside the token ranges; None where there are none."""
    if not ranges:
        return None
    flags = torch.zeros(x.shape[2], dtype=torch.int8, device=x.device)
    for start, stop in ranges:
        flags[start:stop] = 1
    return flags

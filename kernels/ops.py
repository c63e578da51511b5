"""The torch library op through which torch.compile sees a call: its schema, its fake implementation, its packing."""
from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .call import CallSpec, Thresholds
from .types import BlockShape, Residual, SpargeStats, TokenRanges

_NAMESPACE = "comfyui_spargeattn"
_SCHEMA = """attention(Tensor q, Tensor k, Tensor v, *, Tensor? per_head, Tensor? key_padding_mask, Tensor? key_bias,
    Tensor? order, float[] thresholds, float? scale, int[] sink_keys, int[] dense_queries, bool causal,
    bool return_stats, str selection, str layout, str pv_dtype, str skipped, str impl, Tensor? block_mask=None,
    int[] block=[], Tensor? residual=None, Tensor? residual_scale=None,
    bool return_lse=False) -> (Tensor, Tensor, Tensor, Tensor)"""


def attention(q: Tensor, k: Tensor, v: Tensor, call: CallSpec, layout: str,
              impl: str) -> tuple[Tensor, SpargeStats | None, Tensor | None]:
    """`dispatch.attention` as one node of a graph."""
    thresholds, block, residual = call.thresholds, call.mask_block, call.residual
    out, kept, pv_skipped, lse = torch.ops.comfyui_spargeattn.attention(
        q, k, v, per_head=thresholds.per_head, key_padding_mask=call.key_padding_mask, key_bias=call.key_bias,
        order=call.order, thresholds=list(thresholds.numbers), scale=call.scale, sink_keys=_flat(call.sink_keys),
        dense_queries=_flat(call.dense_queries), causal=call.causal, return_stats=call.return_stats,
        selection=thresholds.selection, layout=layout, pv_dtype=call.pv_dtype, skipped=call.skipped, impl=impl,
        block_mask=call.block_mask, block=[] if block is None else [block.q, block.k],
        residual=None if residual is None else residual.quantised,
        residual_scale=None if residual is None else residual.scale, return_lse=call.return_lse)
    return out, SpargeStats(kept, pv_skipped) if call.return_stats else None, lse if call.return_lse else None


def _attention(q: Tensor, k: Tensor, v: Tensor, *, per_head: Tensor | None, thresholds: list[float], selection: str,
               sink_keys: list[int], dense_queries: list[int], layout: str, impl: str, block: list[int] | None = None,
               residual: Tensor | None = None, residual_scale: Tensor | None = None,
               **fields) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op itself, whose statistics and log-sum-exp are empty unless asked for. `fields` are those of `CallSpec` as
    they are."""
    call = CallSpec(Thresholds(selection, (thresholds[0], thresholds[1], thresholds[2]), per_head),
                    sink_keys=_pairs(sink_keys), dense_queries=_pairs(dense_queries),
                    mask_block=BlockShape(*block) if block else None,
                    residual=None if residual is None or residual_scale is None else Residual(residual, residual_scale),
                    **fields)
    out, stats, lse = dispatch.attention(q, k, v, call, layout, impl)
    kept, pv_skipped = (_nothing(q), _nothing(q)) if stats is None else (stats.kept, stats.pv_skipped)
    return out, kept, pv_skipped, _nothing(q) if lse is None else lse


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *, return_stats: bool, layout: str, return_lse: bool = False,
                    **fields) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens = (q.shape[layout.index(axis)] for axis in "BHN")
    kept, pv_skipped = (q.new_empty((batch, heads), dtype=torch.float32) if return_stats else _nothing(q)
                        for _ in range(2))
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32) if return_lse else _nothing(q)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), kept, pv_skipped, lse


def _nothing(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


def _flat(ranges: TokenRanges | None) -> list[int]:
    return [int(end) for pair in ranges or () for end in pair]


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2]))


def _register() -> torch.library.Library | None:
    """Define the op once a process: the package may be loaded by path and by name in the same one."""
    if hasattr(torch.ops.comfyui_spargeattn, "attention"):
        return None
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("attention", _attention, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::attention", _fake_attention, lib=library)
    return library


_library = _register()

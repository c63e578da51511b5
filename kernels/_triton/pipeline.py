"""The fast path of a call: prepare → map → attend. Nothing here waits for the device."""
from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..call import CallSpec
from ..capability import arch_of, pv_format
from ..failures import FastPathError
from ..formats import LOG2E
from ..types import BlockMap, BlockShape, Residual, SpargeStats, TokenRanges
from . import replay
from .attend import attend
from .block_lists import BlockLists
from .blockmap import select_blocks
from .config import AttendConfig, attend_config
from .count import count
from .given_map import lists_from_mask
from .launch import Region, current_stream
from .measured import configuration
from .memory import SMALL, groups_of_heads, groups_where_long, input_bytes, is_short
from .output import Target
from .prepare_keys import prepare_keys
from .prepare_queries import prepare_queries
from .prepared import PreparedKeys, PreparedQueries, PreparedValues, SampledStatistics
from .primitives import channel_tiles, padded_dim
from .replay import Results, room_for_attention, room_for_residual


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, call: CallSpec) -> SpargeStats | None:
    """Write the attention of q (B, H, Nq, D), k, v (B, Hkv, Nk, D) into out like q, and the log-sum-exp into lse,
    float32 (B, H, Nq), if there is one; the statistics if asked.

    Takes the heads in groups where memory is short. `out` may be v itself; then it does wherever the sequence is long.
    """
    stats = replay.statistics(q.shape[:2], q.device) if call.return_stats else None
    if out is v:
        _over_values(q, k, v, Target(out, stats=stats), call)
    else:
        _in_memory(q, k, v, Target(out, lse=lse, stats=stats), call)
    return stats


def residual(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: CallSpec) -> Residual:
    """What `dense`, attention like q, has beyond the attention of the same arguments as above, or where the line to it
    from the earlier residual of the call leads."""
    made = Residual.empty(q.shape, q.device)
    if call.residual is not None:  # the kernel finds a row of both in one place
        call = replace(call, residual=call.residual.contiguous())
    _in_memory(q, k, v, Target(dense if dense.stride(-1) == 1 else dense.contiguous(), residual=made), call)
    return made


def _over_values(q: Tensor, k: Tensor, v: Tensor, target: Target, call: CallSpec) -> None:
    """Attention of q, k and v, all of one shape, whose target is v.

    A group of heads is written where its own v was, which is quantised by then. So beside q, k and v there are the
    copies of one group alone, less than dense attention takes for its result. What fails before the first group has
    been launched leaves v as it was. Raises RuntimeError, and no other error, where something fails later.
    """
    config, pv_int8 = _configure(q, call.pv_dtype)
    call.check_blocks(config.block, q.shape[2], k.shape[2])
    written = False
    with torch.cuda.device_of(q):
        for first, last in groups_where_long(q, k, pv_int8, config.block, call.pooled):
            of_group = slice(first, last)
            try:
                part = target.heads(of_group)
                made = _attention(q[:, of_group], k[:, of_group], v[:, of_group], part, call.heads(first, last, 1),
                                  config, pv_int8)
                written = True
                _count(*made, part, config.block)
            except (FastPathError, torch.OutOfMemoryError) as error:
                if not written:
                    raise
                raise RuntimeError(f"attention failed after it had overwritten some of v: {error}") from error
            del made  # before the next group takes memory


def _in_memory(q: Tensor, k: Tensor, v: Tensor, target: Target, call: CallSpec) -> None:
    """`_attention` of all heads, together or in groups, as memory allows."""
    config, pv_int8 = _configure(q, call.pv_dtype)
    call.check_blocks(config.block, q.shape[2], k.shape[2])
    size = q, k, pv_int8, config.block, call.pooled
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        if not is_short(*size):
            try:
                with _recorded(q, k, v, target, call):
                    _count(*_attention(q, k, v, target, call, config, pv_int8), target, config.block)
                return
            except torch.OutOfMemoryError:
                pass  # what the attempt held is free once this handler is left
        group = q.shape[1] // k.shape[1]
        for first, last in groups_of_heads(*size):
            of_queries, of_keys = slice(first * group, last * group), slice(first, last)
            part = target.heads(of_queries)
            _count(*_attention(q[:, of_queries], k[:, of_keys], v[:, of_keys], part, call.heads(first, last, group),
                               config, pv_int8), part, config.block)


def _recorded(q: Tensor, k: Tensor, v: Tensor, target: Target, call: CallSpec) -> AbstractContextManager[None]:
    """Record the launches inside for later calls of the same form, if this call has one."""
    # Longer calls keep the device busy, and find memory in several pieces more easily.
    form = call.form if input_bytes(q, k) <= SMALL else None
    inputs, stats, made = call.inputs(q, k, v), target.stats, target.residual
    # What makes room holds shapes alone: a recording outlives the tensors of its call.
    if made is not None:
        inputs, results = (*inputs, target.out), Results.residual(made)
        room = partial(room_for_residual, shape=tuple(made.quantised.shape))
    else:
        results = Results.attention(target.out, stats)
        room = partial(room_for_attention, heads=stats and tuple(stats.kept.shape))
    return replay.recorded(form, (*inputs, *results.tensors), room, current_stream)


def predict(q: Tensor, k: Tensor, call: CallSpec) -> BlockMap:
    """The block map alone. Takes the heads of long sequences in groups, as it may run beside all that a call holds."""
    config, _ = _configure(q, call.pv_dtype)
    group, maps = q.shape[1] // k.shape[1], []
    with torch.cuda.device_of(q):
        for first, last in groups_where_long(q, k, False, config.block, False):
            part = call.heads(first, last, group)
            *_, lists = _prepare(q[:, first * group:last * group], k[:, first:last], None, part, config, pv_int8=False,
                                 order=_contiguous(part.order))
            maps.append(lists.public(config.block))
    return maps[0] if len(maps) == 1 else BlockMap(torch.cat([x.indices for x in maps], 1),
                                                   torch.cat([x.counts for x in maps], 1), config.block)


def block_of(q: Tensor, pv_dtype: str) -> BlockShape:
    """The block shape of a call with q (…, D)."""
    return _configure(q, pv_dtype)[0].block


def _configure(q: Tensor, pv_dtype: str) -> tuple[AttendConfig, bool]:
    """The launch configuration, and whether P·V is multiplied in INT8."""
    arch, dim = arch_of(q.device), q.shape[-1]
    chosen = pv_format(pv_dtype, arch, dim)
    entry = attend_config(arch, sum(channel_tiles(dim)), chosen)
    return configuration(q.device, entry, padded_dim(dim), chosen), chosen == "int8"


def _attention(q: Tensor, k: Tensor, v: Tensor, target: Target, call: CallSpec, config: AttendConfig,
               pv_int8: bool) -> tuple[BlockLists, Region | None]:
    """Attention of all heads together, into its target; what its statistics are made of.

    The target is written by the last launch alone, after which only a log-sum-exp takes memory.
    """
    order = _contiguous(call.order)
    queries, statistics, keys, values, lists = _prepare(q, k, v, call, config, pv_int8, order)
    skips = attend(queries, keys, values, lists, target, residual=call.residual, lead=call.lead, k_tokens=k.shape[2],
                   order=order, per_head=call.thresholds.per_head, pv_threshold=call.thresholds.numbers[2],
                   causal=call.causal, predicted=call.block_mask is None, config=config,
                   count_skips=target.stats is not None)
    if target.lse is not None:
        centre = statistics.key_centre(q.shape[-1]).repeat_interleave(q.shape[1] // k.shape[1], 1)
        target.lse.add_(call.shared_score(q, centre))
    return lists, skips


def _prepare(q: Tensor, k: Tensor, v: Tensor | None, call: CallSpec, config: AttendConfig, pv_int8: bool,
             order: Tensor | None) -> tuple[PreparedQueries, SampledStatistics, PreparedKeys, PreparedValues | None,
                                            BlockLists]:
    """All that attention reads: prepared tensors and the lists of kept blocks. Without v, what the map needs alone."""
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias, padding = (_contiguous(x) for x in call.bias_and_padding())
    block, scale, pooled = config.block, call.scale_for(q.shape[-1]), call.pooled
    groups = call.mixing_groups(q.shape[-1])
    queries, statistics = prepare_queries(q, k, v, factor=scale * LOG2E, order=order,
                                          flags=_flags(call.dense_queries, q), padding=padding, block=block,
                                          groups=groups, judged=call.judges_similarity)
    keys, values = prepare_keys(k, v, statistics, order=order, flags=_flags(call.sink_keys, k), padding=padding,
                                block=block, pv_int8=pv_int8, pooled=pooled, bias=bias, groups=groups,
                                key_group=config.key_group, judged=call.judges_similarity)
    if call.block_mask is not None:
        lists = lists_from_mask(call.block_mask, keys, values, heads=q.shape[1], q_tokens=q.shape[2],
                                causal=call.causal, block=block, pooled=pooled)
    else:
        thresholds = call.thresholds
        lists = select_blocks(queries, keys, values, scale=scale, per_head=thresholds.per_head,
                              thresholds=thresholds.numbers, selection=thresholds.selection, causal=call.causal,
                              q_tokens=q.shape[2], block=block, pooled=pooled, registers=config.map_registers)
    return queries, statistics, keys, values, lists


def _count(lists: BlockLists, skips: Region | None, target: Target, block: BlockShape) -> None:
    """Write the statistics, if the target takes some, of what `_attention` returned."""
    if target.stats is not None:
        count(lists, skips, target.stats, block)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _flags(ranges: TokenRanges | None, x: Tensor) -> Tensor | None:
    """int8 (N,), 1 inside the token ranges; None where there are none."""
    if not ranges:
        return None
    flags = torch.zeros(x.shape[2], dtype=torch.int8, device=x.device)
    for start, stop in ranges:
        flags[start:stop] = 1
    if (recording := replay.recording()) is not None:
        recording.keeps(flags)
    return flags

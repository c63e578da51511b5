"""Attend: block-sparse quantised attention over the lists of kept blocks."""
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FP8_MAX, ROW_GROUP
from .blockmap import BlockLists
from .config import AUTOTUNE_CHOICES, AttendConfig, autotune
from .launch import HAS_DESCRIPTORS, descriptor, launch
from .prepare import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import order_rows, padded_dim, rows_of, threshold_of, token_at, token_strides


@triton.jit
def _load_tile(source, row, column, PITCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A [ROWS, COLS] tile of a prepared tensor whose rows are `PITCH` long, zero past the pitch."""
    if TMA:
        return source.load([row, column])
    else:
        rows = row.to(tl.int64) + tl.arange(0, ROWS)
        cols = tl.arange(0, COLS)
        if PITCH < COLS:
            return tl.load(source + rows[:, None] * PITCH + cols, mask=(cols < PITCH)[None, :], other=0)
        else:
            return tl.load(source + rows[:, None] * PITCH + cols)


@triton.jit
def _load_channels(source, row, column, pitch, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr,
                   TMA: tl.constexpr):
    """A [ROWS, COLS] tile of transposed values, rows being channels, of which LIMIT exist."""
    if TMA:
        return source.load([row, column])
    else:
        rows = tl.arange(0, ROWS)
        pointers = source + (row + rows).to(tl.int64)[:, None] * pitch + column + tl.arange(0, COLS)
        if LIMIT < ROWS:
            return tl.load(pointers, mask=rows[:, None] < LIMIT, other=0)
        else:
            return tl.load(pointers)


@triton.jit
def _load_tail(source, row, n, start, PITCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A [ROWS, COLS] tile of the pooled keys or values of a head, which has n; finite beyond them."""
    if TMA:
        return source.load([row * n + start, 0])
    else:
        rows = start + tl.arange(0, ROWS)
        cols = tl.arange(0, COLS)
        pointers = source + (row.to(tl.int64) * n + rows)[:, None] * PITCH + cols
        return tl.load(pointers, mask=(rows < n)[:, None] & (cols < PITCH), other=0)


@triton.jit
def _softmax_step(total, top, s, high, alpha, shift: tl.constexpr):
    """One step of the online softmax over scores s·alpha [M, N] in log2 units; `high` is the maximum of s by rows.

    Returns P times 2^shift, the factor that the sums so far shrink by, the denominator, the running maximum, and the
    maximum of this step.
    """
    local = high * alpha
    new_top = tl.maximum(top, local)
    p = tl.exp2(s * alpha[:, None] - (new_top - shift)[:, None])
    decay = tl.exp2(top - new_top)
    return p, decay, total * decay + tl.sum(p, 1), new_top, local


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_n", "nq", "nk", "n_q", "n_k", "heads", "group",
                               "order_rows"])
def _attend_kernel(q, q_scale, k, k_scale, v, v_scale, v_centre, v_steps, k_valid, k_bias, indices,
                   counts, pooled_k, pooled_scale, pooled_v, tail_weight, out, order, per_head, skips, pv_threshold,
                   stride_b: tl.int64, stride_h: tl.int64, stride_n: tl.int64,
                   nq, nk, n_q, n_k, heads, group, order_rows,
                   D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, FP8: tl.constexpr, CAUSAL: tl.constexpr,
                   SKIP_PV: tl.constexpr, ROW_GROUP: tl.constexpr, TAIL_TILE: tl.constexpr, P_SHIFT: tl.constexpr,
                   TMA: tl.constexpr):
    pid = tl.program_id(0)
    i, row = pid % nq, pid // nq
    if CAUSAL:
        i = nq - 1 - i  # long rows first
    batch, head = row // heads, row % heads
    kv_row = batch * (heads // group) + head // group
    slot = row.to(tl.int64) * nq + i
    lane = tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, DP)
    places = i * BLOCK_Q + lane

    q_tile = _load_tile(q, slot * BLOCK_Q, 0, PITCH, BLOCK_Q, DP, False)  # [BLOCK_Q, DP] int8
    q_step = tl.load(q_scale + slot * BLOCK_Q + lane)
    limit = threshold_of(per_head, 2, head, heads, pv_threshold)
    acc = tl.zeros([BLOCK_Q, DP], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], -1e30, tl.float32)
    n_skipped = 0
    k_scale += kv_row.to(tl.int64) * nk
    indices += slot * nk
    n_unmasked = tl.load(counts + slot * 3)
    n_kept = tl.load(counts + slot * 3 + 1)

    # Blocks that need no mask inside come first in the list, in a loop of their own.
    for MASKED in tl.static_range(2):
        first = n_unmasked if MASKED else 0
        last = n_kept if MASKED else n_unmasked
        # K's step comes one entry ahead: loaded where it is used, it is pipelined through shared memory at a barrier.
        next_step = tl.load(k_scale + tl.load(indices + first, mask=first < n_kept, other=0))
        for entry in range(first, last):
            j = tl.load(indices + entry)
            k_step = next_step
            next_step = tl.load(k_scale + tl.load(indices + entry + 1, mask=entry + 1 < n_kept, other=0))
            k_tile = _load_tile(k, (kv_row * nk + j) * BLOCK_K, 0, PITCH, BLOCK_K, DP, TMA)
            s_int = tl.dot(q_tile, tl.trans(k_tile))  # [BLOCK_Q, BLOCK_K]
            s = s_int.to(tl.float32)
            alpha = q_step * k_step
            if MASKED:
                keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
                if k_bias is not None:  # -inf where there is no key
                    s = s * alpha[:, None] + tl.load(k_bias + kv_row.to(tl.int64) * nk * BLOCK_K + keys)[None, :]
                    alpha = tl.full([BLOCK_Q], 1.0, tl.float32)
                elif k_valid is not None:
                    exists = tl.load(k_valid + kv_row.to(tl.int64) * nk * BLOCK_K + keys) != 0
                    s = tl.where(exists[None, :], s, float("-inf"))
                else:
                    s = tl.where((keys < n_k)[None, :], s, float("-inf"))
                if CAUSAL:
                    s = tl.where(keys[None, :] <= places[:, None], s, float("-inf"))
                high = tl.max(s, 1)
            else:
                high = tl.max(s_int, 1).to(tl.float32)  # of integers: three in one instruction on sm90
            p, decay, total, top, local = _softmax_step(total, top, s, high, alpha, P_SHIFT)
            if MASKED:
                v_step = tl.load(v_steps + kv_row.to(tl.int64) * nk + j)
                if not FP8:  # the sums are brought to the unit of this block's values and back
                    decay /= v_step
            acc *= decay[:, None]
            n_below = 0
            if SKIP_PV:
                below = tl.max(tl.reshape(local - top, [BLOCK_Q // ROW_GROUP, ROW_GROUP]), 1) < -limit
                n_below = tl.sum(below.to(tl.int32), 0)
                n_skipped += n_below
                rows_below = tl.reshape(tl.broadcast_to(below[:, None], [BLOCK_Q // ROW_GROUP, ROW_GROUP]), [BLOCK_Q])
                p = tl.where(rows_below[:, None], 0.0, p)
                if MASKED:
                    n_below = tl.where(v_step == v_step, n_below, 0)  # values that are not finite reach every row
            if n_below < BLOCK_Q // ROW_GROUP:
                if FP8:
                    v_tile = _load_channels(v, kv_row * D, j * BLOCK_K, nk * BLOCK_K, DP, BLOCK_K, D, TMA)
                    p = tl.reshape(p, [BLOCK_Q, BLOCK_K // 16, 2, 4, 2])
                    p = tl.reshape(tl.permute(p, [0, 1, 3, 2, 4]), [BLOCK_Q, BLOCK_K])
                    # Not accumulated inside the product: FP8 tensor cores keep 14 bits of a sum, and truncate.
                    product = tl.dot(p.to(tl.float8e4nv), tl.trans(v_tile), max_num_imprecise_acc=BLOCK_K)
                    acc += product * v_step if MASKED else product
                else:
                    v_tile = _load_tile(v, (kv_row * nk + j) * BLOCK_K, 0, PITCH, BLOCK_K, DP, TMA)
                    acc = tl.dot(p.to(tl.float16), v_tile, acc)
            if MASKED and not FP8:
                acc *= v_step

    if pooled_k is not None:
        for start in range(0, nk, TAIL_TILE):  # all of it, without a test for blocks to stand in for: loads run ahead
            j = start + tl.arange(0, TAIL_TILE)
            inside = j < nk
            k_tile = _load_tail(pooled_k, kv_row, nk, start, PITCH, TAIL_TILE, DP, TMA)
            k_step = tl.load(pooled_scale + kv_row.to(tl.int64) * nk + j, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(tail_weight + slot * nk + j, mask=inside, other=float("-inf")).to(tl.float32)
            s = tl.dot(q_tile, tl.trans(k_tile)).to(tl.float32) * k_step[None, :] * q_step[:, None] + weight[None, :]
            one = tl.full([BLOCK_Q], 1.0, tl.float32)
            p, decay, total, top, local = _softmax_step(total, top, s, tl.max(s, 1), one, P_SHIFT)
            v_tile = _load_tail(pooled_v, kv_row, nk, start, PITCH, TAIL_TILE, DP, TMA)
            if FP8:
                # A product of its own, which `fma` keeps apart from the sum: accumulated inside it, ptxas runs short of
                # registers for the loops above too and lets every product of the kernel wait for the one before.
                decay = tl.broadcast_to(decay[:, None], [BLOCK_Q, DP])
                acc = tl.fma(acc, decay, tl.dot(p.to(tl.float16), v_tile))
            else:
                acc = acc * decay[:, None] + tl.dot(p.to(tl.float16), v_tile)

    scale = tl.load(v_scale + kv_row * D + cols, mask=cols < D, other=0.0)
    centre = tl.load(v_centre + kv_row * D + cols, mask=cols < D, other=0.0)
    acc = tl.where(total[:, None] == 0, 0.0, acc / total[:, None] * scale[None, :] + centre[None, :])
    tokens = token_at(order, (head // group) % order_rows, places, n_q)
    pointers = rows_of(out, batch, head, tokens, stride_b, stride_h, stride_n, ALIGN)
    mask = (places < n_q)[:, None] & (cols < D)
    tl.store(pointers[:, None] + cols, acc.to(out.dtype.element_ty), mask=mask)
    if skips is not None:
        tl.store(skips + slot, n_skipped)


@functools.lru_cache
def _autotuned_kernel():
    choices = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in AUTOTUNE_CHOICES]
    return triton.autotune(choices, key=["DP", "FP8", "CAUSAL", "SKIP_PV"])(_attend_kernel)


def attend(queries: PreparedQueries, keys: PreparedKeys, values: PreparedValues, lists: BlockLists, out: Tensor, *,
           n_k: int, order: Tensor | None, per_head: Tensor | None, pv_threshold: float, causal: bool,
           config: AttendConfig, count_skips: bool) -> Tensor | None:
    """Write the attention of prepared tensors into out (B, H, Nq, D), any strides with a contiguous last dimension.

    Returns int32 (B, H, nq), the row groups whose P·V was skipped, or None where the λ test is off or not counted.
    """
    batch, heads, n_q, dim = out.shape
    kv_heads, nk = keys.similarity.shape[1:]
    nq, pitch, padded = queries.similarity.shape[2], keys.quantised.shape[-1], padded_dim(dim)
    block, fp8 = config.block, values.values.dtype == torch.float8_e4m3fn
    skip_pv = pv_threshold < float("inf")
    skips = torch.empty((batch, heads, nq), dtype=torch.int32, device=out.device) if skip_pv and count_skips else None
    k, v, pooled_k, pooled_v = keys.quantised, values.values, keys.pooled, values.pooled
    tma = config.tma and HAS_DESCRIPTORS
    if tma:
        rows = batch * kv_heads
        k = descriptor(k, rows * nk * block.k, pitch, [block.k, padded])
        v = (descriptor(v, rows * dim, nk * block.k, [padded, block.k]) if fp8 else
             descriptor(v, rows * nk * block.k, pitch, [block.k, padded]))
        if pooled_k is not None:
            tile = [config.tail_tile, padded]
            pooled_k, pooled_v = (descriptor(x, rows * nk, pitch, tile) for x in (pooled_k, pooled_v))
    strides, align = token_strides(out)
    arguments = (queries.quantised, queries.scale, k, keys.scale, v, values.scale, values.centre, values.step,
                 keys.valid, keys.bias, lists.indices, lists.counts, pooled_k, keys.pooled_scale, pooled_v, lists.tail,
                 out, order, per_head, skips, pv_threshold, *strides, nq, nk, n_q, n_k, heads, heads // kv_heads,
                 order_rows(order))
    constants = dict(D=dim, DP=padded, PITCH=pitch, BLOCK_Q=block.q, BLOCK_K=block.k, ALIGN=align, FP8=fp8,
                     CAUSAL=causal, SKIP_PV=skip_pv, ROW_GROUP=ROW_GROUP, TAIL_TILE=config.tail_tile,
                     P_SHIFT=math.log2(FP8_MAX) if fp8 else 0.0, TMA=tma)
    kernel, options = (_autotuned_kernel(), {}) if autotune() else (_attend_kernel, config.options())
    launch(kernel, (nq * batch * heads,), out.device, arguments, constants, options)
    return skips

"""Preparation: the pass over K and V that finds mean and range, and the passes that pool and quantise Q and K, V."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import FP8_MAX
from ..types import BlockShape
from .config import prepare_warps
from .primitives import (
    block_similarity,
    order_rows,
    padded_dim,
    round_up,
    rows_of,
    to_int8,
    token_at,
    token_strides,
)

_SPLITS = 32  # programs a head that share the pass over K and V


@dataclass(frozen=True)
class PreparedQueries:
    """quantised int8 (B, H, n·b, pitch), scale float32 (B, H, n·b) with the softmax scale and log2 e folded in,
    mean float32 (B, H, n, D), similarity float32 (B, H, n), -inf where the block holds a dense query."""

    quantised: Tensor
    scale: Tensor
    mean: Tensor
    similarity: Tensor


@dataclass(frozen=True)
class PreparedKeys:
    """quantised int8 (B, Hkv, n·b, pitch), scale float32 (B, Hkv, n), mean float32 (B, Hkv, n, D), similarity float32
    (B, Hkv, n), -inf where the block holds a sink, count int32 (B, Hkv, n) of valid keys, valid int8 (B, Hkv, n·b) or
    None without padding, pooled int8 (B, Hkv, n, pitch) with pooled_scale float32 (B, Hkv, n), or None."""

    quantised: Tensor
    scale: Tensor
    mean: Tensor
    similarity: Tensor
    count: Tensor
    valid: Tensor | None
    pooled: Tensor | None
    pooled_scale: Tensor | None


@dataclass(frozen=True)
class PreparedValues:
    """V less its mean over its per-channel scale: float16 (B, Hkv, n·b, pitch), or float8 (B, Hkv, D, n·b) whose keys
    are permuted inside each 16; scale and centre float32 (B, Hkv, D); pooled float16 (B, Hkv, n, pitch), the means of
    its blocks, or None."""

    values: Tensor
    scale: Tensor
    centre: Tensor
    pooled: Tensor | None


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_n", "n", "blocks", "heads", "order_rows", "group"])
def _queries_kernel(x, order, flags, quantised, scales, means, similarity, factor,
                    stride_b: tl.int64, stride_h: tl.int64, stride_n: tl.int64, n, blocks, heads, order_rows, group,
                    D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    i, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    places = i * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, DP)
    exists = places < n
    tokens = token_at(order, (head // group) % order_rows, places, n)
    pointers = rows_of(x, batch, head, tokens, stride_b, stride_h, stride_n, ALIGN)
    q = tl.load(pointers[:, None] + cols, mask=exists[:, None] & (cols < D), other=0.0).to(tl.float32)  # [BLOCK, DP]

    count = tl.minimum(BLOCK, n - i * BLOCK).to(tl.float32)
    slot = row.to(tl.int64) * blocks + i
    alike = block_similarity(q, count)
    if flags is not None:
        flagged = tl.max(tl.load(flags + tokens, mask=exists, other=0), 0)
        alike = tl.where(flagged > 0, float("-inf"), alike)
    tl.store(similarity + slot, alike)
    tl.store(means + slot * D + cols, tl.sum(q, 0) / count, mask=cols < D)

    # The attention kernel finds row maxima before it applies the scales, which therefore have to be positive.
    q = tl.where(factor < 0, -q, q)
    step = tl.maximum(tl.max(tl.abs(q), 1), 1e-12) / 127.0
    places = slot * BLOCK + tl.arange(0, BLOCK)
    tl.store(quantised + places[:, None] * PITCH + cols, to_int8(q / step[:, None]), mask=cols < PITCH)
    tl.store(scales + places, step * tl.maximum(tl.abs(factor), 1e-18))


@triton.jit(do_not_specialize=["k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n", "n",
                               "heads", "rows_each"])
def _sums_kernel(k, v, padding, k_sums, v_sums, v_highs, v_lows, counts,
                     k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n: tl.int64,
                     v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_n: tl.int64, n, heads, rows_each,
                     D: tl.constexpr, DP: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr,
                     TILE: tl.constexpr):
    """Sums of K and V and the range of V per channel, and the number of valid keys, over one stretch of a head."""
    split, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    cols = tl.arange(0, DP)
    k_sum = tl.zeros([TILE, DP], tl.float32)
    v_sum = tl.zeros([TILE, DP], tl.float32)
    v_high = tl.full([TILE, DP], float("-inf"), tl.float32)
    v_low = tl.full([TILE, DP], float("inf"), tl.float32)
    count = tl.zeros([TILE], tl.int32)
    for start in range(split * rows_each, tl.minimum((split + 1) * rows_each, n), TILE):
        rows = start + tl.arange(0, TILE)
        exists = rows < n
        if padding is not None:
            exists = exists & (tl.load(padding + batch.to(tl.int64) * n + rows, mask=exists, other=1) == 0)
        mask = exists[:, None] & (cols < D)
        k_rows = rows_of(k, batch, head, rows, k_stride_b, k_stride_h, k_stride_n, K_ALIGN)
        v_rows = rows_of(v, batch, head, rows, v_stride_b, v_stride_h, v_stride_n, V_ALIGN)
        k_sum += tl.load(k_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(v_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        v_sum += x
        v_high = tl.where(mask, tl.maximum(v_high, x), v_high)
        v_low = tl.where(mask, tl.minimum(v_low, x), v_low)
        count += exists.to(tl.int32)
    slot = row * tl.num_programs(0) + split
    tl.store(k_sums + slot * DP + cols, tl.sum(k_sum, 0))
    tl.store(v_sums + slot * DP + cols, tl.sum(v_sum, 0))
    tl.store(v_highs + slot * DP + cols, tl.max(v_high, 0))
    tl.store(v_lows + slot * DP + cols, tl.min(v_low, 0))
    tl.store(counts + slot, tl.sum(count, 0))


@triton.jit
def _finish_sums_kernel(k_sums, v_sums, v_highs, v_lows, counts, k_mean, v_centre, v_scale, v_limit,
                        D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """Means of K and V and V's scale per channel of one head, from its stretches."""
    row = tl.program_id(0)
    cols = tl.arange(0, DP)
    slots = row * SPLITS + tl.arange(0, SPLITS)
    count = tl.maximum(tl.sum(tl.load(counts + slots), 0), 1).to(tl.float32)
    tile = slots[:, None] * DP + cols
    tl.store(k_mean + row * DP + cols, tl.sum(tl.load(k_sums + tile), 0) / count)
    centre = tl.sum(tl.load(v_sums + tile), 0) / count
    reach = tl.maximum(tl.max(tl.load(v_highs + tile), 0) - centre, centre - tl.min(tl.load(v_lows + tile), 0))
    tl.store(v_centre + row * D + cols, centre, mask=cols < D)
    tl.store(v_scale + row * D + cols, tl.maximum(reach, 1e-12) / v_limit, mask=cols < D)


@triton.jit(do_not_specialize=["k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n", "n",
                               "blocks", "heads", "order_rows"])
def _keys_kernel(k, v, order, flags, padding, k_mean, v_centre, v_scale,
                 quantised, scales, means, similarity, counts, valid, pooled, pooled_scales, values, v_pooled,
                 k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n: tl.int64,
                 v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_n: tl.int64, n, blocks, heads, order_rows,
                 D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr,
                 K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, FP8: tl.constexpr):
    j, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    cols = tl.arange(0, DP)
    slot = row.to(tl.int64) * blocks + j
    lane = tl.arange(0, BLOCK)
    order_row = head % order_rows

    places = j * BLOCK + lane
    tokens = token_at(order, order_row, places, n)
    exists = places < n
    if padding is not None:
        exists = exists & (tl.load(padding + batch.to(tl.int64) * n + tokens, mask=exists, other=1) == 0)
        tl.store(valid + slot * BLOCK + lane, exists.to(tl.int8))
    kept = tl.sum(exists.to(tl.int32), 0)
    count = tl.maximum(kept, 1).to(tl.float32)
    tl.store(counts + slot, kept)

    rows = rows_of(k, batch, head, tokens, k_stride_b, k_stride_h, k_stride_n, K_ALIGN)
    x = tl.load(rows[:, None] + cols, mask=exists[:, None] & (cols < D), other=0.0).to(tl.float32)
    x = tl.where(exists[:, None], x - tl.load(k_mean + row * DP + cols)[None, :], 0.0)  # [BLOCK, DP]
    alike = block_similarity(x, count)
    if flags is not None:
        flagged = tl.max(tl.load(flags + tokens, mask=places < n, other=0), 0)
        alike = tl.where(flagged > 0, float("-inf"), alike)
    tl.store(similarity + slot, alike)
    mean = tl.sum(x, 0) / count
    tl.store(means + slot * D + cols, mean, mask=cols < D)
    step = tl.maximum(tl.max(tl.abs(x)), 1e-12) / 127.0
    tl.store(scales + slot, step)
    tl.store(quantised + (slot * BLOCK + lane)[:, None] * PITCH + cols, to_int8(x / step), mask=cols < PITCH)
    if pooled is not None:
        step = tl.maximum(tl.max(tl.abs(mean)), 1e-12) / 127.0
        tl.store(pooled_scales + slot, step)
        tl.store(pooled + slot * PITCH + cols, to_int8(mean / step), mask=cols < PITCH)

    if values is not None:
        if FP8:
            # The registers of P hold keys (half, lane, pair) of each 16 where the FP8 operand wants (lane, half, pair):
            # storing V in that order makes the conversion of P free.
            lane = (lane // 16) * 16 + (lane // 2 % 2) * 8 + (lane // 4 % 4) * 2 + lane % 2
        places = j * BLOCK + lane
        tokens = token_at(order, order_row, places, n)
        exists = places < n
        if padding is not None:
            exists = exists & (tl.load(padding + batch.to(tl.int64) * n + tokens, mask=exists, other=1) == 0)
        rows = rows_of(v, batch, head, tokens, v_stride_b, v_stride_h, v_stride_n, V_ALIGN)
        x = tl.load(rows[:, None] + cols, mask=exists[:, None] & (cols < D), other=0.0).to(tl.float32)
        x -= tl.load(v_centre + row * D + cols, mask=cols < D, other=0.0)[None, :]
        x = tl.where(exists[:, None], x / tl.load(v_scale + row * D + cols, mask=cols < D, other=1.0)[None, :], 0.0)
        if v_pooled is not None:
            tl.store(v_pooled + slot * PITCH + cols, (tl.sum(x, 0) / count).to(tl.float16), mask=cols < PITCH)
        lane = tl.arange(0, BLOCK)
        if FP8:
            channels = row.to(tl.int64) * D + cols
            pointers = values + channels[:, None] * blocks * BLOCK + j * BLOCK + lane
            tl.store(pointers, tl.trans(x.to(values.dtype.element_ty)), mask=cols[:, None] < D)
        else:
            pointers = values + (slot * BLOCK + lane)[:, None] * PITCH + cols
            tl.store(pointers, x.to(tl.float16), mask=cols < PITCH)


def prepare_queries(q: Tensor, *, factor: float, order: Tensor | None, flags: Tensor | None, kv_heads: int,
                    block: BlockShape) -> PreparedQueries:
    """Pool and quantise q (B, H, N, D); `factor` (softmax scale · log2 e) is folded into the scales."""
    batch, heads, n, dim = q.shape
    blocks, pitch, padded = -(-n // block.q), round_up(dim, 16), padded_dim(dim)
    strides, align = token_strides(q)
    new = q.new_empty
    out = PreparedQueries(quantised=new((batch, heads, blocks * block.q, pitch), dtype=torch.int8),
                          scale=new((batch, heads, blocks * block.q), dtype=torch.float32),
                          mean=new((batch, heads, blocks, dim), dtype=torch.float32),
                          similarity=new((batch, heads, blocks), dtype=torch.float32))
    _queries_kernel[blocks, batch * heads](
        q, order, flags, out.quantised, out.scale, out.mean, out.similarity, factor, *strides, n, blocks, heads,
        order_rows(order), heads // kv_heads, D=dim, DP=padded, PITCH=pitch, BLOCK=block.q, ALIGN=align,
        num_warps=prepare_warps(block.q, padded))
    return out


def prepare_keys(k: Tensor, v: Tensor | None, *, order: Tensor | None, flags: Tensor | None, padding: Tensor | None,
                 block: BlockShape, fp8: bool, pooled: bool) -> tuple[PreparedKeys, PreparedValues | None]:
    """Centre, pool and quantise k (B, Hkv, N, D) and, unless it is None, centre, scale and convert v of its shape.

    The weights of a row of attention sum to one: what is subtracted from every value comes back by one addition at the
    end, and costs no bits of the number format until then.
    """
    batch, heads, n, dim = k.shape
    blocks, pitch, padded = -(-n // block.k), round_up(dim, 16), padded_dim(dim)
    (k_strides, k_align), (v_strides, v_align) = token_strides(k), token_strides(k if v is None else v)

    def new(*shape, dtype=torch.float32):
        return torch.empty((batch, heads, *shape), dtype=dtype, device=k.device)

    sums, counts = [new(_SPLITS, padded) for _ in range(4)], new(_SPLITS, dtype=torch.int32)
    k_mean, v_centre, v_scale = new(padded), new(dim), new(dim)
    tile = max(16, 4096 // padded)
    _sums_kernel[_SPLITS, batch * heads](
        k, k if v is None else v, padding, *sums, counts, *k_strides, *v_strides, n, heads,
        round_up(-(-n // _SPLITS), tile), D=dim, DP=padded, K_ALIGN=k_align, V_ALIGN=v_align, TILE=tile, num_warps=4)
    _finish_sums_kernel[(batch * heads,)](*sums, counts, k_mean, v_centre, v_scale, FP8_MAX if fp8 else 1.0,
                                          D=dim, DP=padded, SPLITS=_SPLITS, num_warps=4)

    keys = PreparedKeys(quantised=new(blocks * block.k, pitch, dtype=torch.int8), scale=new(blocks),
                        mean=new(blocks, dim), similarity=new(blocks), count=new(blocks, dtype=torch.int32),
                        valid=None if padding is None else new(blocks * block.k, dtype=torch.int8),
                        pooled=new(blocks, pitch, dtype=torch.int8) if pooled else None,
                        pooled_scale=new(blocks) if pooled else None)
    values = None
    if v is not None:
        stored = (new(dim, blocks * block.k, dtype=torch.float8_e4m3fn) if fp8 else
                  new(blocks * block.k, pitch, dtype=torch.float16))
        values = PreparedValues(stored, v_scale, v_centre, new(blocks, pitch, dtype=torch.float16) if pooled else None)
    _keys_kernel[blocks, batch * heads](
        k, v, order, flags, padding, k_mean, v_centre, v_scale, keys.quantised, keys.scale, keys.mean, keys.similarity,
        keys.count, keys.valid, keys.pooled, keys.pooled_scale, values and values.values, values and values.pooled,
        *k_strides, *v_strides, n, blocks, heads, order_rows(order), D=dim, DP=padded, PITCH=pitch, BLOCK=block.k,
        K_ALIGN=k_align, V_ALIGN=v_align, FP8=fp8, num_warps=prepare_warps(block.k, padded))
    return keys, values

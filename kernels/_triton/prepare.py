"""Preparation: one launch pools and quantises Q and samples K and V, another pools and quantises K and converts V."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FP8_MAX
from ..types import BlockShape
from .config import prepare_warps, store_bytes
from .launch import Region, allocate, launch
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
from .sample import SAMPLE, SPLITS, constant_of_keys, constants_of_values, sample_rows

# The largest sampled value of a channel becomes 1 in float16 and an eighth of the range in float8: others may be
# larger. Rounding stays as fine as it is, because neither format comes near its smallest normal number.
_V_REACH = {True: FP8_MAX / 8, False: 1.0}
# A block with values beyond this is divided by a power of two of its own.
_V_LIMIT = {True: FP8_MAX, False: 2.0 ** 14}


@dataclass(frozen=True)
class PreparedQueries:
    """quantised int8 (B, H, n·b, pitch), scale float32 (B, H, n·b) with the softmax scale and log2 e folded in,
    mean float32 (B, H, n, D), similarity float32 (B, H, n), -inf where the block holds a dense query; partial float32
    (B, Hkv, splits, 4, Dp), the sampled sums of K and of V and the largest and smallest V, with the number of sampled
    tokens, int32 (B, Hkv, splits), in sampled."""

    quantised: Region
    scale: Region
    mean: Region
    similarity: Region
    partial: Region
    sampled: Region


@dataclass(frozen=True)
class PreparedKeys:
    """quantised int8 (B, Hkv, n·b, pitch), scale float32 (B, Hkv, n), mean float32 (B, Hkv, n, D), similarity float32
    (B, Hkv, n), -inf where the block holds a sink, count int32 (B, Hkv, n) of valid keys, valid int8 (B, Hkv, n·b) or
    None without padding, pooled int8 (B, Hkv, n, pitch) with pooled_scale bfloat16 (B, Hkv, n), or None.

    With a bias on keys, in place of valid: bias float32 (B, Hkv, n·b) in log2 units, -inf where there is no key; its
    mean over a block, mean_bias float32 (B, Hkv, n); whether it is anything but zero there, biased int8 (B, Hkv, n)."""

    quantised: Region
    scale: Region
    mean: Region
    similarity: Region
    count: Region
    valid: Region | None
    pooled: Region | None
    pooled_scale: Region | None
    bias: Region | None = None
    mean_bias: Region | None = None
    biased: Region | None = None


@dataclass(frozen=True)
class PreparedValues:
    """V less a constant by channel, over a scale by channel and a step by block: float16 (B, Hkv, n·b, pitch), or
    float8 (B, Hkv, D, n·b) whose keys are permuted inside each 16; scale and centre float32 (B, Hkv, D); step float32
    (B, Hkv, n), a power of two, 1 unless the block holds values far beyond the sampled ones; pooled float16
    (B, Hkv, n, pitch), the means of its blocks (their step apart), or None."""

    values: Region
    scale: Region
    centre: Region
    step: Region
    pooled: Region | None


@triton.jit
def _quantise_queries(x, order, flags, quantised, scales, means, similarity, factor, i, row, batch, head,
                      stride_b, stride_h, stride_n, n, blocks, pitch, order_rows, group,
                      D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, STORE: tl.constexpr,
                      ALIGN: tl.constexpr):
    """Pool and quantise one block of queries."""
    places = i * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, DP)
    exists = places < n
    tokens = token_at(order, (head // group) % order_rows, places, n)
    pointers = rows_of(x, batch, head, tokens, stride_b, stride_h, stride_n, ALIGN)
    q = tl.load(pointers[:, None] + cols, mask=exists[:, None] & (cols < D), other=0.0).to(tl.float32)  # [BLOCK, DP]

    count = tl.minimum(BLOCK, n - i * BLOCK).to(tl.float32)
    slot = row.to(tl.int64) * blocks + i
    alike = block_similarity(q, count)
    finite = alike == alike
    if flags is not None:
        flagged = tl.max(tl.load(flags + tokens, mask=exists, other=0), 0)
        alike = tl.where(flagged > 0, float("-inf"), alike)
    tl.store(similarity + slot, alike)
    tl.store(means + slot * D + cols, tl.sum(q, 0) / count, mask=cols < D)

    # The attention kernel finds row maxima before it applies the scales, which therefore have to be positive.
    largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-12)
    inverse = tl.where(factor < 0, -127.0, 127.0) / largest
    places = slot * BLOCK + tl.arange(0, BLOCK)
    tl.store(quantised + places[:, None] * pitch * STORE + cols, to_int8(q * inverse[:, None]),
             mask=(cols < PITCH)[None, :])
    # A scale of NaN makes a row NaN, as dense attention would: here all rows of the block, which costs nothing to tell.
    unit = tl.where(finite, tl.maximum(tl.abs(factor), 1e-18) / 127.0, float("nan"))
    tl.store(scales + places, largest * unit)


@triton.jit(do_not_specialize=["q_stride_b", "q_stride_h", "q_stride_n", "k_stride_b", "k_stride_h", "k_stride_n",
                               "v_stride_b", "v_stride_h", "v_stride_n", "n_q", "n_k", "blocks", "heads", "kv_heads",
                               "samples", "pitch", "order_rows"])
def _queries_kernel(q, k, v, order, flags, padding, quantised, scales, means, similarity, partial, sampled, factor,
                    q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_n: tl.int64,
                    k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n: tl.int64,
                    v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_n: tl.int64,
                    n_q, n_k, blocks, heads, kv_heads, samples, pitch, order_rows,
                    D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, STORE: tl.constexpr,
                    Q_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, TILE: tl.constexpr,
                    SAMPLE: tl.constexpr, SPLITS: tl.constexpr):
    """The first `samples` programs sample K and V, the others take a block of queries each."""
    pid = tl.program_id(0)
    if pid < samples:
        row = pid // SPLITS
        sample_rows(k, v, padding, partial, sampled, pid % SPLITS, row, row // kv_heads, row % kv_heads,
                    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, n_k,
                    D, DP, K_ALIGN, V_ALIGN, TILE, SAMPLE, SPLITS)
    else:
        row = (pid - samples) // blocks
        _quantise_queries(q, order, flags, quantised, scales, means, similarity, factor, (pid - samples) % blocks, row,
                          row // heads, row % heads, q_stride_b, q_stride_h, q_stride_n, n_q, blocks, pitch,
                          order_rows, heads // kv_heads, D, DP, PITCH, BLOCK, STORE, Q_ALIGN)


@triton.jit
def _exists(padding, batch, tokens, places, n):
    """Which of the tokens at `places` are there and no padding."""
    exists = places < n
    if padding is not None:
        exists = exists & (tl.load(padding + batch.to(tl.int64) * n + tokens, mask=exists, other=1) == 0)
    return exists


@triton.jit
def _quantise_keys(k, order, flags, padding, bias, partial, sampled, quantised, scales, means, similarity, counts,
                   valid, pooled, pooled_scales, biases, mean_bias, biased, j, row, batch, head, order_row,
                   stride_b, stride_h, stride_n, n, blocks, pitch,
                   D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, STORE: tl.constexpr,
                   ALIGN: tl.constexpr, SPLITS: tl.constexpr):
    """Centre, pool and quantise one block of keys."""
    cols = tl.arange(0, DP)
    lane = tl.arange(0, BLOCK)
    slot = row.to(tl.int64) * blocks + j
    places = j * BLOCK + lane
    tokens = token_at(order, order_row, places, n)
    exists = _exists(padding, batch, tokens, places, n)
    kept = tl.sum(exists.to(tl.int32), 0)
    count = tl.maximum(kept, 1).to(tl.float32)
    tl.store(counts + slot, kept)
    if bias is not None:
        extra = tl.load(bias + batch.to(tl.int64) * n + tokens, mask=exists, other=0.0)
        tl.store(mean_bias + slot, tl.sum(extra, 0) / count)
        tl.store(biased + slot, tl.max((extra != 0).to(tl.int8), 0))
        tl.store(biases + slot * BLOCK + lane, tl.where(exists, extra, float("-inf")))
    elif padding is not None:
        tl.store(valid + slot * BLOCK + lane, exists.to(tl.int8))

    constant = constant_of_keys(partial, sampled, row, cols, DP, SPLITS)
    rows = rows_of(k, batch, head, tokens, stride_b, stride_h, stride_n, ALIGN)
    x = tl.load(rows[:, None] + cols, mask=exists[:, None] & (cols < D), other=0.0).to(tl.float32)
    x -= constant[None, :] * exists.to(tl.float32)[:, None]  # [BLOCK, DP]
    alike = block_similarity(x, count)
    finite = alike == alike
    if flags is not None:
        flagged = tl.max(tl.load(flags + tokens, mask=places < n, other=0), 0)
        alike = tl.where(flagged > 0, float("-inf"), alike)
    tl.store(similarity + slot, alike)
    mean = tl.sum(x, 0) / count
    tl.store(means + slot * D + cols, mean, mask=cols < D)
    step = tl.where(finite, tl.maximum(tl.max(tl.abs(x)), 1e-12) / 127.0, float("nan"))
    tl.store(scales + slot, step)
    pointers = quantised + (slot * BLOCK + lane)[:, None] * pitch * STORE + cols
    tl.store(pointers, to_int8(x * (1.0 / step)), mask=(cols < PITCH)[None, :])
    if pooled is not None:
        # Two bytes, because the attention kernel would wait for larger ones at a barrier; rounded up to fit.
        step = (tl.maximum(tl.max(tl.abs(mean)), 1e-12) / 127.0 * (1 + 2.0 ** -7)).to(tl.bfloat16)
        tl.store(pooled_scales + slot, step)
        tl.store(pooled + slot * PITCH + cols, to_int8(mean / step.to(tl.float32)), mask=cols < PITCH)


@triton.jit
def _convert_values(v, order, padding, partial, sampled, centres, scales, values, steps, pooled, reach, limit,
                    j, row, batch, head, order_row, stride_b, stride_h, stride_n, n, blocks,
                    D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
                    FP8: tl.constexpr, SPLITS: tl.constexpr):
    """Centre, scale and convert one block of values."""
    cols = tl.arange(0, DP)
    lane = tl.arange(0, BLOCK)
    slot = row.to(tl.int64) * blocks + j
    if FP8:
        # The registers of P hold keys (half, lane, pair) of each 16 where the FP8 operand wants (lane, half, pair):
        # storing V in that order makes the conversion of P free.
        lane = (lane // 16) * 16 + (lane // 2 % 2) * 8 + (lane // 4 % 4) * 2 + lane % 2
    places = j * BLOCK + lane
    tokens = token_at(order, order_row, places, n)
    exists = _exists(padding, batch, tokens, places, n)
    centre, scale = constants_of_values(partial, sampled, row, cols, reach, DP, SPLITS)
    if j == 0:
        tl.store(centres + row * D + cols, centre, mask=cols < D)
        tl.store(scales + row * D + cols, scale, mask=cols < D)
    rows = rows_of(v, batch, head, tokens, stride_b, stride_h, stride_n, ALIGN)
    x = tl.load(rows[:, None] + cols, mask=exists[:, None] & (cols < D), other=0.0).to(tl.float32)
    x = (x - centre[None, :] * exists.to(tl.float32)[:, None]) * (1.0 / scale)[None, :]
    if pooled is not None:
        mean = tl.sum(x, 0) / tl.maximum(tl.sum(exists.to(tl.int32), 0), 1).to(tl.float32)
        mean = tl.clamp(mean, -65504.0, 65504.0)
        tl.store(pooled + slot * PITCH + cols, mean.to(tl.float16), mask=cols < PITCH)
    # As integers, the bits of floats order as the floats do, with NaN on top; a maximum of floats leaves NaN out.
    excess = tl.max(tl.abs(x).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True) / limit
    exponent = tl.where(excess < float("inf"), tl.ceil(tl.log2(tl.maximum(excess, 1.0))), float("nan"))
    tl.store(steps + slot, tl.exp2(exponent))
    if exponent > 0:
        x *= tl.exp2(-exponent)
    lane = tl.arange(0, BLOCK)
    if FP8:
        channels = row.to(tl.int64) * D + cols
        pointers = values + channels[:, None] * blocks * BLOCK + j * BLOCK + lane
        tl.store(pointers, tl.trans(x.to(values.dtype.element_ty)), mask=(cols < D)[:, None])
    else:
        pointers = values + (slot * BLOCK + lane)[:, None] * PITCH + cols
        tl.store(pointers, x.to(tl.float16), mask=(cols < PITCH)[None, :])


@triton.jit(do_not_specialize=["k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n", "n",
                               "blocks", "heads", "pitch", "order_rows", "key_programs"])
def _keys_kernel(k, v, order, flags, padding, bias, partial, sampled, quantised, scales, means, similarity, counts,
                 valid, pooled, pooled_scales, biases, mean_bias, biased, v_centre, v_scale, values, v_steps, v_pooled,
                 v_reach, v_limit, k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n: tl.int64,
                 v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_n: tl.int64, n, blocks, heads, pitch,
                 order_rows, key_programs, D: tl.constexpr, DP: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr,
                 STORE: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, FP8: tl.constexpr,
                 SPLITS: tl.constexpr):
    """The first `key_programs` programs take a block of keys each, the others, if any, a block of values."""
    pid = tl.program_id(0)
    j, row = pid % key_programs % blocks, pid % key_programs // blocks
    batch, head = row // heads, row % heads
    order_row = head % order_rows
    if pid < key_programs:
        _quantise_keys(k, order, flags, padding, bias, partial, sampled, quantised, scales, means, similarity, counts,
                       valid, pooled, pooled_scales, biases, mean_bias, biased, j, row, batch, head, order_row,
                       k_stride_b, k_stride_h, k_stride_n, n, blocks, pitch, D, DP, PITCH, BLOCK, STORE, K_ALIGN,
                       SPLITS)
    elif values is not None:
        _convert_values(v, order, padding, partial, sampled, v_centre, v_scale, values, v_steps, v_pooled, v_reach,
                        v_limit, j, row, batch, head, order_row, v_stride_b, v_stride_h, v_stride_n, n, blocks, D, DP,
                        PITCH, BLOCK, V_ALIGN, FP8, SPLITS)


def prepare_queries(q: Tensor, k: Tensor, v: Tensor | None, *, factor: float, order: Tensor | None,
                    flags: Tensor | None, padding: Tensor | None, block: BlockShape) -> PreparedQueries:
    """Pool and quantise q (B, H, N, D); `factor` (softmax scale · log2 e) is folded into the scales. Sample k and, if
    there is one, v (B, Hkv, M, D) for `prepare_keys`."""
    (batch, heads, n, dim), (_, kv_heads, n_k, _) = q.shape, k.shape
    blocks, pitch, padded, samples = -(-n // block.q), round_up(dim, 16), padded_dim(dim), batch * kv_heads * SPLITS
    v = k if v is None else v
    store = store_bytes(block.q)
    (q_strides, q_align), (k_strides, k_align), (v_strides, v_align) = (token_strides(x) for x in (q, k, v))
    out = PreparedQueries(*allocate(
        q.device, ((batch, heads, blocks * block.q, pitch), torch.int8),
        ((batch, heads, blocks * block.q), torch.float32), ((batch, heads, blocks, dim), torch.float32),
        ((batch, heads, blocks), torch.float32),
        ((batch, kv_heads, SPLITS, 4, padded), torch.float32), ((batch, kv_heads, SPLITS), torch.int32)))
    launch(_queries_kernel, (samples + blocks * batch * heads,), q.device,
           (q, k, v, order, flags, padding, out.quantised, out.scale, out.mean, out.similarity, out.partial,
            out.sampled, factor, *q_strides, *k_strides, *v_strides, n, n_k, blocks, heads, kv_heads, samples,
            pitch // store, order_rows(order)),
           dict(D=dim, DP=padded, PITCH=pitch, BLOCK=block.q, STORE=store, Q_ALIGN=q_align, K_ALIGN=k_align,
                V_ALIGN=v_align, TILE=min(1024 // padded, SAMPLE // SPLITS), SAMPLE=SAMPLE, SPLITS=SPLITS),
           dict(num_warps=prepare_warps(block.q, padded)))
    return out


def prepare_keys(k: Tensor, v: Tensor | None, queries: PreparedQueries, *, order: Tensor | None, flags: Tensor | None,
                 padding: Tensor | None, block: BlockShape, fp8: bool, pooled: bool,
                 bias: Tensor | None = None) -> tuple[PreparedKeys, PreparedValues | None]:
    """Centre, pool and quantise k (B, Hkv, N, D) and, unless it is None, centre, scale and convert v of its shape, by
    the sample that `queries` holds. `bias`, float32 (B, N), is in log2 units; keys that it hides are in `padding`."""
    batch, heads, n, dim = k.shape
    blocks, pitch, padded, store = -(-n // block.k), round_up(dim, 16), padded_dim(dim), store_bytes(block.k)
    (k_strides, k_align), (v_strides, v_align) = token_strides(k), token_strides(k if v is None else v)
    head, each, rows = (batch, heads), (batch, heads, blocks), (batch, heads, blocks * block.k)
    f32, f16, int8 = torch.float32, torch.float16, torch.int8
    stored = ((*head, dim, rows[2]), torch.float8_e4m3fn) if fp8 else ((*rows, pitch), f16)
    *keys, centre, scale, values, step, v_pooled = allocate(
        k.device, ((*rows, pitch), int8), (each, f32), ((*each, dim), f32), (each, f32), (each, torch.int32),
        None if padding is None or bias is not None else (rows, int8), ((*each, pitch), int8) if pooled else None,
        (each, torch.bfloat16) if pooled else None, None if bias is None else (rows, f32),
        None if bias is None else (each, f32), None if bias is None else (each, int8), ((*head, dim), f32),
        ((*head, dim), f32),
        None if v is None else stored, (each, f32), ((*each, pitch), f16) if pooled and v is not None else None)
    programs = blocks * batch * heads
    launch(_keys_kernel, (programs if v is None else 2 * programs,), k.device,
           (k, v, order, flags, padding, bias, queries.partial, queries.sampled, *keys, centre, scale, values, step,
            v_pooled, _V_REACH[fp8], _V_LIMIT[fp8], *k_strides, *v_strides, n, blocks, heads, pitch // store,
            order_rows(order), programs),
           dict(D=dim, DP=padded, PITCH=pitch, BLOCK=block.k, STORE=store, K_ALIGN=k_align, V_ALIGN=v_align,
                FP8=fp8, SPLITS=SPLITS),
           dict(num_warps=prepare_warps(block.k, padded)))
    return PreparedKeys(*keys), None if v is None else PreparedValues(values, scale, centre, step, v_pooled)

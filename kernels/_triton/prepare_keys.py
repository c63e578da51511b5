"""Preparation, second launch: pool and quantise K, convert V, less the constants that the first launch sampled."""
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FLOAT16_LIMIT, INT8_LIMIT, INT8_MAX
from ..types import BlockShape
from . import sample
from .block_lists import skip_words, words_a_row
from .config import prepare_warps, store_bytes
from .launch import allocate, launch
from .prepared import PreparedKeys, PreparedValues, SampledStatistics
from .primitives import (
    block_similarity,
    channels_in_groups,
    in_groups,
    mark_forced,
    mixed,
    order_rows,
    padded_dim,
    row_pitch,
    row_pointers,
    to_int8,
    token_strides,
    tokens_at,
    without_padding,
)
from .sample import centre_and_scale_of_values, centre_of_keys

# The largest sampled value of a channel becomes 1. In float16 a block with values beyond this limit is divided by a
# power of two of its own. Rounding stays as fine, because float16 comes nowhere near its smallest normal number.
# `fp16_sums` can't overflow: P is at most 1, so a sum over at most 128 keys is at most 128 · 2^8 = 2^15, to which
# rounding to float16 adds less than a part in 2^11 at each of 128 additions: it stays below 2^15 · 1.07 < 65504.
_FLOAT16_LIMIT = tl.constexpr(FLOAT16_LIMIT)
# In INT8 a block with values beyond this limit has a scale for each channel: one would cost the others precision.
_INT8_LIMIT = tl.constexpr(INT8_LIMIT)
_INT8_MAX = tl.constexpr(INT8_MAX)
# Blocks that a program takes, if that leaves enough programs to fill a GPU.
_MOST_BLOCKS, _LEAST_PROGRAMS = 4, 400


@triton.jit
def quantise_keys(
        # inputs
        k_ptr, order_ptr, flags_ptr, padding_ptr, bias_ptr, centre,
        # outputs
        quantised_ptr, scale_ptr, mean_ptr, similarity_ptr, count_ptr, valid_ptr, pooled_ptr, pooled_terms_ptr,
        stored_bias_ptr, mean_bias_ptr, biased_ptr,
        # sizes
        k_block, kv_batch_head, batch, kv_head, order_row, stride_b, stride_h, stride_n, k_tokens, k_blocks, row_stores,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, GROUPS: tl.constexpr, JUDGED: tl.constexpr, PITCH: tl.constexpr,
        BLOCK: tl.constexpr, STORE: tl.constexpr, ALIGN: tl.constexpr):
    """Pool and quantise one block of keys, less their centre [PADDED_D]."""
    channels = tl.arange(0, PADDED_D)
    lane = tl.arange(0, BLOCK)
    block = kv_batch_head.to(tl.int64) * k_blocks + k_block
    places = k_block * BLOCK + lane
    tokens = tokens_at(places=places, order_ptr=order_ptr, order_row=order_row, n_tokens=k_tokens)
    exists = without_padding(exists=places < k_tokens, tokens=tokens, padding_ptr=padding_ptr, batch=batch,
                             n_tokens=k_tokens)
    existing = tl.sum(exists.to(tl.int32), 0)
    count = tl.maximum(existing, 1).to(tl.float32)
    tl.store(count_ptr + block, existing)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + batch.to(tl.int64) * k_tokens + tokens, mask=exists, other=0.0)  # [BLOCK]
        tl.store(mean_bias_ptr + block, tl.sum(bias, 0) / count)
        tl.store(biased_ptr + block, tl.max((bias != 0).to(tl.int8), 0))
        tl.store(stored_bias_ptr + block * BLOCK + lane, tl.where(exists, bias, float("-inf")))
    elif padding_ptr is not None:
        tl.store(valid_ptr + block * BLOCK + lane, exists.to(tl.int8))

    rows = row_pointers(x_ptr=k_ptr, batch=batch, head=kv_head, tokens=tokens, stride_b=stride_b, stride_h=stride_h,
                        stride_n=stride_n, ALIGN=ALIGN)
    mask = exists[:, None] & (channels < D)
    k = tl.load(rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
    k -= centre[None, :] * exists.to(tl.float32)[:, None]  # [BLOCK, PADDED_D]
    mean = tl.sum(k, 0) / count  # [PADDED_D]
    tl.store(mean_ptr + block * D + channels, mean, mask=channels < D)
    similarity = block_similarity(x=k, mean=mean, count=count, JUDGED=JUDGED)
    finite = similarity == similarity
    similarity = mark_forced(similarity=similarity, flags_ptr=flags_ptr, tokens=tokens, exists=places < k_tokens)
    tl.store(similarity_ptr + block, similarity)

    if GROUPS > 1:  # loaded again, so that a thread holds all groups of a channel
        channels = channels_in_groups(PADDED_D, GROUPS)
        k = tl.load(rows[None, :, None] + channels, mask=exists[None, :, None], other=0.0).to(tl.float32)
        k -= in_groups(centre, GROUPS) * exists.to(tl.float32)[None, :, None]
        k = mixed(x=k)  # [GROUPS, BLOCK, D / GROUPS]
        mean = mixed(x=in_groups(mean, GROUPS))
    scale = tl.where(finite, tl.maximum(tl.max(tl.abs(k)), 1e-12) / 127.0, float("nan"))
    tl.store(scale_ptr + block, scale / GROUPS)
    k = to_int8(k * (1.0 / scale))
    stored = (block * BLOCK + lane) * row_stores * STORE
    if GROUPS > 1:
        tl.store(quantised_ptr + stored[None, :, None] + channels, k)
    else:
        tl.store(quantised_ptr + stored[:, None] + channels, k, mask=(channels < PITCH)[None, :])
    if pooled_ptr is not None:
        weight = tl.log2(count)
        if bias_ptr is not None:
            weight += tl.sum(bias, 0) / count
        weight = weight.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        pooled_scale = tl.maximum(tl.max(tl.abs(mean)), 1e-12) * ((1 + 2.0 ** -7) / 127.0 / GROUPS)
        terms = pooled_scale.to(tl.int32, bitcast=True) & -65536 | weight  # at most 2^-7 less, so that all numbers fit
        words = words_a_row(k_blocks)
        row = pooled_terms_ptr + kv_batch_head.to(tl.int64) * (words * 32)
        tl.store(row + k_block, terms)
        behind = k_block + 1 + tl.arange(0, 64)  # of the row's last blocks: attention reads whole words of blocks
        tl.store(row + behind, 0, mask=(behind >= k_blocks) & (behind < words * 32))
        pooled = to_int8(mean / (terms.to(tl.float32, bitcast=True) * GROUPS))
        tl.store(pooled_ptr + block * PITCH + channels, pooled, mask=channels < PITCH)


def pooled_dtype(device: torch.device) -> torch.dtype:
    """What PreparedValues.pooled is stored as: bfloat16, because with P in a format of float32's range the pooled tail
    needs no maximum; float32 in Triton's interpreter, which does not multiply bfloat16."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.float32 if interpreted else torch.bfloat16


@triton.jit
def block_scale_of(values, PV_INT8: tl.constexpr):
    """What values [BLOCK, PADDED_D] are divided by to fit their format: the largest becomes 127 in INT8; in float16 a
    power of two, at least 1. NaN where one is not finite."""
    # As integers, the bits of floats order as the floats do, with NaN on top; a maximum of floats leaves NaN out.
    largest = tl.max(tl.abs(values).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    if PV_INT8:
        scale = tl.maximum(largest, 1e-12) / _INT8_MAX
    else:
        scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest / _FLOAT16_LIMIT, 1.0))))
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def convert_values(
        # inputs
        v_ptr, order_ptr, padding_ptr, centre, scale,
        # outputs
        centre_ptr, scale_ptr, values_ptr, block_scale_ptr, channel_scale_ptr, pooled_ptr,
        # sizes
        k_block, kv_batch_head, batch, kv_head, order_row, stride_b, stride_h, stride_n, k_tokens, k_blocks,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
        PV_INT8: tl.constexpr, KEY_GROUP: tl.constexpr):
    """Convert one block of values, less their centre and in units of their scale, both [PADDED_D]."""
    channels = tl.arange(0, PADDED_D)
    lane = tl.arange(0, BLOCK)
    block = kv_batch_head.to(tl.int64) * k_blocks + k_block
    if PV_INT8:
        # The registers of P hold keys (tile, lane, pair) of each group where an 8-bit operand wants (lane, tile, pair):
        # storing V in that order makes the conversion of P free.
        tiles: tl.constexpr = KEY_GROUP // 8
        tile, quad = lane // 2 % tiles, lane // (2 * tiles) % 4
        lane = (lane // KEY_GROUP) * KEY_GROUP + tile * 8 + quad * 2 + lane % 2
    places = k_block * BLOCK + lane
    tokens = tokens_at(places=places, order_ptr=order_ptr, order_row=order_row, n_tokens=k_tokens)
    exists = without_padding(exists=places < k_tokens, tokens=tokens, padding_ptr=padding_ptr, batch=batch,
                             n_tokens=k_tokens)
    if k_block == 0:
        tl.store(centre_ptr + kv_batch_head * D + channels, centre, mask=channels < D)
        tl.store(scale_ptr + kv_batch_head * D + channels, scale, mask=channels < D)
    rows = row_pointers(x_ptr=v_ptr, batch=batch, head=kv_head, tokens=tokens, stride_b=stride_b, stride_h=stride_h,
                        stride_n=stride_n, ALIGN=ALIGN)
    mask = exists[:, None] & (channels < D)
    v = tl.load(rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, PADDED_D]
    v = (v - centre[None, :] * exists.to(tl.float32)[:, None]) * (1.0 / scale)[None, :]
    if pooled_ptr is not None:
        mean = tl.sum(v, 0) / tl.maximum(tl.sum(exists.to(tl.int32), 0), 1).to(tl.float32)  # [PADDED_D]
        mean = tl.where(tl.abs(mean) < 1e38, mean, 0.0)  # not even zero times it may meet a row
        tl.store(pooled_ptr + block * PITCH + channels, mean.to(pooled_ptr.dtype.element_ty), mask=channels < PITCH)
    block_scale = block_scale_of(values=v, PV_INT8=PV_INT8)
    tl.store(block_scale_ptr + block, block_scale)
    inverse = 1.0 / block_scale
    if PV_INT8:
        if block_scale > _INT8_LIMIT / _INT8_MAX:
            scale = tl.maximum(tl.max(tl.abs(v), 0), 1e-12) / _INT8_MAX  # [PADDED_D]
            tl.store(channel_scale_ptr + block * D + channels, scale, mask=channels < D)
            v *= (block_scale / scale)[None, :]
    v *= inverse
    lane = tl.arange(0, BLOCK)
    if PV_INT8:
        rows = kv_batch_head.to(tl.int64) * D + channels
        pointers = values_ptr + rows[:, None] * k_blocks * BLOCK + k_block * BLOCK + lane  # [PADDED_D, BLOCK]
        tl.store(pointers, tl.trans(to_int8(v)), mask=(channels < D)[:, None])
    else:
        pointers = values_ptr + (block * BLOCK + lane)[:, None] * PITCH + channels  # [BLOCK, PADDED_D]
        tl.store(pointers, v.to(tl.float16), mask=(channels < PITCH)[None, :])


@triton.jit(do_not_specialize=["k_stride_b", "k_stride_h", "k_stride_n", "v_stride_b", "v_stride_h", "v_stride_n",
                               "k_tokens", "k_blocks", "kv_heads", "row_stores", "order_rows", "key_programs",
                               "blocks_a_program"])
def _keys_kernel(
        # inputs
        k_ptr, v_ptr, order_ptr, flags_ptr, padding_ptr, bias_ptr, partial_ptr, sampled_ptr,
        # outputs
        quantised_ptr, scale_ptr, mean_ptr, similarity_ptr, count_ptr, valid_ptr, pooled_ptr, pooled_terms_ptr,
        stored_bias_ptr, mean_bias_ptr, biased_ptr, v_centre_ptr, v_scale_ptr, values_ptr, v_block_scale_ptr,
        v_channel_scale_ptr, v_pooled_ptr,
        # sizes
        k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n: tl.int64,
        v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_n: tl.int64,
        k_tokens, k_blocks, kv_heads, row_stores, order_rows, key_programs, blocks_a_program,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, GROUPS: tl.constexpr, JUDGED: tl.constexpr, PITCH: tl.constexpr,
        BLOCK: tl.constexpr, STORE: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, PV_INT8: tl.constexpr,
        KEY_GROUP: tl.constexpr, SPLITS: tl.constexpr):
    """Each of the first `key_programs` programs takes some blocks of keys of a head, which share what is found of its
    sample; each of the others, if any, as many blocks of values.

    Keys: x = k - centre; quantised = round(x / scale), scale = max |x| / 127 over the block, mean = Σ x / count.
    Values: x = (v - v_centre) / v_scale; values = x / v_block_scale in float16 or int8.

    k_ptr, v_ptr: (B, Hkv, k_tokens, D), in one 16- or 32-bit floating format.
    order_ptr: int32 (order_rows, k_tokens), the token at each place of the blocking order, or None.
    flags_ptr: int8 (k_tokens,), 1 for sinks, or None.
    padding_ptr: bool (B, k_tokens), True for keys to ignore, or None.
    bias_ptr: float32 (B, k_tokens), added to the scores of a key in log2 units, or None.
    partial_ptr, sampled_ptr: `SampledStatistics`.
    Outputs: `PreparedKeys` (stored_bias_ptr is `bias` there) and `PreparedValues`; values_ptr is None without V.
    Strides are in units of ALIGN elements, `row_stores` is the pitch in units of STORE.
    """
    pid = tl.program_id(0)
    programs = tl.cdiv(k_blocks, blocks_a_program)  # of a head
    first, kv_batch_head = pid % key_programs % programs * blocks_a_program, pid % key_programs // programs
    last = tl.minimum(first + blocks_a_program, k_blocks)
    batch, kv_head = kv_batch_head // kv_heads, kv_batch_head % kv_heads
    order_row = kv_head % order_rows
    channels = tl.arange(0, PADDED_D)
    if pid < key_programs:
        centre = centre_of_keys(partial_ptr=partial_ptr, sampled_ptr=sampled_ptr, kv_batch_head=kv_batch_head,
                                channels=channels, PADDED_D=PADDED_D, SPLITS=SPLITS)
        for k_block in range(first, last):
            quantise_keys(
                k_ptr=k_ptr, order_ptr=order_ptr, flags_ptr=flags_ptr, padding_ptr=padding_ptr, bias_ptr=bias_ptr,
                centre=centre,
                quantised_ptr=quantised_ptr, scale_ptr=scale_ptr, mean_ptr=mean_ptr, similarity_ptr=similarity_ptr,
                count_ptr=count_ptr, valid_ptr=valid_ptr, pooled_ptr=pooled_ptr, pooled_terms_ptr=pooled_terms_ptr,
                stored_bias_ptr=stored_bias_ptr, mean_bias_ptr=mean_bias_ptr, biased_ptr=biased_ptr,
                k_block=k_block, kv_batch_head=kv_batch_head, batch=batch, kv_head=kv_head, order_row=order_row,
                stride_b=k_stride_b, stride_h=k_stride_h, stride_n=k_stride_n, k_tokens=k_tokens, k_blocks=k_blocks,
                row_stores=row_stores,
                D=D, PADDED_D=PADDED_D, GROUPS=GROUPS, JUDGED=JUDGED, PITCH=PITCH, BLOCK=BLOCK, STORE=STORE,
                ALIGN=K_ALIGN)
    elif values_ptr is not None:
        centre, scale = centre_and_scale_of_values(
            partial_ptr=partial_ptr, sampled_ptr=sampled_ptr, kv_batch_head=kv_batch_head, channels=channels,
            PADDED_D=PADDED_D, SPLITS=SPLITS)
        for k_block in range(first, last):
            convert_values(
                v_ptr=v_ptr, order_ptr=order_ptr, padding_ptr=padding_ptr, centre=centre, scale=scale,
                centre_ptr=v_centre_ptr, scale_ptr=v_scale_ptr, values_ptr=values_ptr,
                block_scale_ptr=v_block_scale_ptr, channel_scale_ptr=v_channel_scale_ptr, pooled_ptr=v_pooled_ptr,
                k_block=k_block, kv_batch_head=kv_batch_head, batch=batch, kv_head=kv_head, order_row=order_row,
                stride_b=v_stride_b, stride_h=v_stride_h, stride_n=v_stride_n, k_tokens=k_tokens, k_blocks=k_blocks,
                D=D, PADDED_D=PADDED_D, PITCH=PITCH, BLOCK=BLOCK, ALIGN=V_ALIGN, PV_INT8=PV_INT8,
                KEY_GROUP=KEY_GROUP)


def prepare_keys(k: Tensor, v: Tensor | None, statistics: SampledStatistics, *, order: Tensor | None,
                 flags: Tensor | None, padding: Tensor | None, block: BlockShape, pv_int8: bool, pooled: bool,
                 bias: Tensor | None = None, groups: int = 1, key_group: int = 16,
                 judged: bool = True) -> tuple[PreparedKeys, PreparedValues | None]:
    """Centre, pool and quantise k (B, Hkv, Nk, D) and, unless it is None, centre, scale and convert v of its shape.

    statistics: of k and v, from `prepare_queries`. order: int32 (Nk,) or (Hkv, Nk). flags: int8 (Nk,), 1 for sinks.
    padding: bool (B, Nk), True for keys to ignore, those that the bias hides among them. bias: float32 (B, Nk), in log2
    units. pooled: whether to store the means for the pooled tail. groups, judged: `CallSpec.mixing_groups` and
    `judges_similarity`. key_group: see `AttendConfig`.
    """
    batch, kv_heads, k_tokens, dim = k.shape
    k_blocks, pitch, padded, store = -(-k_tokens // block.k), row_pitch(dim), padded_dim(dim), store_bytes(block.k)
    (k_strides, k_align), (v_strides, v_align) = token_strides(k), token_strides(k if v is None else v)
    head, each_block, places = (batch, kv_heads), (batch, kv_heads, k_blocks), (batch, kv_heads, k_blocks * block.k)
    f32, f16, int8 = torch.float32, torch.float16, torch.int8
    of_keys = dict(
        quantised=((*places, pitch), int8), scale=(each_block, f32), mean=((*each_block, dim), f32),
        similarity=(each_block, f32), count=(each_block, torch.int32),
        valid=(places, int8) if padding is not None and bias is None else None,
        pooled=((*each_block, pitch), int8) if pooled else None,
        pooled_terms=((*head, 32 * skip_words(k_blocks)), torch.int32) if pooled else None,
        bias=None if bias is None else (places, f32), mean_bias=None if bias is None else (each_block, f32),
        biased=None if bias is None else (each_block, int8))
    converted = ((*head, dim, places[2]), int8) if pv_int8 else ((*places, pitch), f16)
    of_values = dict(
        values=None if v is None else converted, scale=((*head, dim), f32), centre=((*head, dim), f32),
        block_scale=(each_block, f32), channel_scale=((*each_block, dim), f32) if pv_int8 else None,
        pooled=((*each_block, pitch), pooled_dtype(k.device)) if pooled and v is not None else None)
    regions = allocate(k.device, *of_keys.values(), *of_values.values())
    keys = PreparedKeys(**dict(zip(of_keys, regions)))
    values = PreparedValues(**dict(zip(of_values, regions[len(of_keys):])))
    tensors = 1 if v is None else 2
    blocks_a_program = max(1, min(_MOST_BLOCKS, tensors * k_blocks * batch * kv_heads // _LEAST_PROGRAMS))
    programs = -(-k_blocks // blocks_a_program) * batch * kv_heads
    launch(
        _keys_kernel, (tensors * programs,), k.device,
        inputs=dict(k_ptr=k, v_ptr=v, order_ptr=order, flags_ptr=flags, padding_ptr=padding, bias_ptr=bias,
                    partial_ptr=statistics.partial, sampled_ptr=statistics.sampled),
        outputs=dict(quantised_ptr=keys.quantised, scale_ptr=keys.scale, mean_ptr=keys.mean,
                     similarity_ptr=keys.similarity, count_ptr=keys.count, valid_ptr=keys.valid,
                     pooled_ptr=keys.pooled, pooled_terms_ptr=keys.pooled_terms, stored_bias_ptr=keys.bias,
                     mean_bias_ptr=keys.mean_bias, biased_ptr=keys.biased, v_centre_ptr=values.centre,
                     v_scale_ptr=values.scale, values_ptr=values.values, v_block_scale_ptr=values.block_scale,
                     v_channel_scale_ptr=values.channel_scale, v_pooled_ptr=values.pooled),
        sizes=dict(k_stride_b=k_strides[0], k_stride_h=k_strides[1], k_stride_n=k_strides[2],
                   v_stride_b=v_strides[0], v_stride_h=v_strides[1], v_stride_n=v_strides[2],
                   k_tokens=k_tokens, k_blocks=k_blocks, kv_heads=kv_heads, row_stores=pitch // store,
                   order_rows=order_rows(order), key_programs=programs, blocks_a_program=blocks_a_program),
        constants=dict(D=dim, PADDED_D=padded, GROUPS=groups, JUDGED=judged, PITCH=pitch, BLOCK=block.k, STORE=store,
                       K_ALIGN=k_align, V_ALIGN=v_align, PV_INT8=pv_int8, KEY_GROUP=key_group,
                       SPLITS=sample.SPLITS),
        options=dict(num_warps=prepare_warps(block.k, padded)))
    return keys, None if v is None else values

"""Preparation, first launch: pool and quantise Q, and sample K and V for the second."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import BlockShape
from . import sample
from .config import prepare_warps, store_bytes
from .launch import allocate, launch
from .prepared import PreparedQueries, SampledStatistics
from .primitives import (
    block_similarity,
    channels_in_groups,
    mark_forced,
    mixed,
    order_rows,
    padded_dim,
    row_pitch,
    row_pointers,
    to_int8,
    token_strides,
    tokens_at,
)
from .sample import sample_keys_and_values


@triton.jit
def quantise_queries(
        # inputs
        q_ptr, order_ptr, flags_ptr, factor,
        # outputs
        quantised_ptr, scale_ptr, mean_ptr, similarity_ptr,
        # sizes
        q_block, batch_head, batch, head, stride_b, stride_h, stride_n, q_tokens, q_blocks, row_stores, order_rows,
        group,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, GROUPS: tl.constexpr, JUDGED: tl.constexpr, PITCH: tl.constexpr,
        BLOCK: tl.constexpr, STORE: tl.constexpr, ALIGN: tl.constexpr):
    """Pool and quantise one block of queries."""
    places = q_block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, PADDED_D)
    exists = places < q_tokens
    tokens = tokens_at(places=places, order_ptr=order_ptr, order_row=(head // group) % order_rows, n_tokens=q_tokens)
    rows = row_pointers(x_ptr=q_ptr, batch=batch, head=head, tokens=tokens, stride_b=stride_b, stride_h=stride_h,
                        stride_n=stride_n, ALIGN=ALIGN)
    mask = exists[:, None] & (channels < D)
    q = tl.load(rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, PADDED_D]

    count = tl.minimum(BLOCK, q_tokens - q_block * BLOCK).to(tl.float32)
    block = batch_head.to(tl.int64) * q_blocks + q_block
    mean = tl.sum(q, 0) / count  # [PADDED_D]
    tl.store(mean_ptr + block * D + channels, mean, mask=channels < D)
    similarity = block_similarity(x=q, mean=mean, count=count, JUDGED=JUDGED)
    finite = similarity == similarity
    similarity = mark_forced(similarity=similarity, flags_ptr=flags_ptr, tokens=tokens, exists=exists)
    tl.store(similarity_ptr + block, similarity)

    # The attention kernel finds row maxima before it applies the scales, which therefore have to be positive.
    most = tl.where(factor < 0, -127.0, 127.0)
    stored = block * BLOCK + tl.arange(0, BLOCK)
    if GROUPS > 1:  # loaded again, so that a thread holds all groups of a channel
        channels = channels_in_groups(PADDED_D, GROUPS)
        q = tl.load(rows[None, :, None] + channels, mask=exists[None, :, None], other=0.0).to(tl.float32)
        q = mixed(x=q)  # [GROUPS, BLOCK, D / GROUPS]
        largest = tl.maximum(tl.max(tl.max(tl.abs(q), 0), 1), 1e-12)  # [BLOCK]
        tl.store(quantised_ptr + stored[None, :, None] * row_stores * STORE + channels,
                 to_int8(q * (most / largest)[None, :, None]))
    else:
        largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-12)  # [BLOCK]
        tl.store(quantised_ptr + stored[:, None] * row_stores * STORE + channels,
                 to_int8(q * (most / largest)[:, None]), mask=(channels < PITCH)[None, :])
    # A scale of NaN makes a row NaN, as dense attention would: here all rows of the block, which costs nothing to tell.
    unit = tl.where(finite, tl.maximum(tl.abs(factor), 1e-18) / 127.0, float("nan"))
    tl.store(scale_ptr + stored, largest * unit)


@triton.jit(do_not_specialize=["q_stride_b", "q_stride_h", "q_stride_n", "k_stride_b", "k_stride_h", "k_stride_n",
                               "v_stride_b", "v_stride_h", "v_stride_n", "q_tokens", "k_tokens", "q_blocks", "heads",
                               "kv_heads", "sampling_programs", "row_stores", "order_rows"])
def _queries_kernel(
        # inputs
        q_ptr, k_ptr, v_ptr, order_ptr, flags_ptr, padding_ptr, factor,
        # outputs
        quantised_ptr, scale_ptr, mean_ptr, similarity_ptr, partial_ptr, sampled_ptr,
        # sizes
        q_stride_b: tl.int64, q_stride_h: tl.int64, q_stride_n: tl.int64,
        k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_n: tl.int64,
        v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_n: tl.int64,
        q_tokens, k_tokens, q_blocks, heads, kv_heads, sampling_programs, row_stores, order_rows,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, GROUPS: tl.constexpr, JUDGED: tl.constexpr, PITCH: tl.constexpr,
        BLOCK: tl.constexpr, STORE: tl.constexpr, Q_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr,
        TILE: tl.constexpr, SAMPLE: tl.constexpr, SPLITS: tl.constexpr):
    """The first `sampling_programs` programs sample K and V, each of the others takes a block of queries.

    quantised = round(q · 127 / max |q|) by row, scale = max |q| / 127 · factor, mean = Σ q / count, similarity = the
    mean cosine over all pairs of a block's rows.

    q_ptr: (B, H, q_tokens, D), k_ptr and v_ptr: (B, Hkv, k_tokens, D), in one 16- or 32-bit floating format.
    order_ptr: int32 (order_rows, q_tokens), the token at each place of the blocking order, or None.
    flags_ptr: int8 (q_tokens,), 1 for dense queries, or None.
    padding_ptr: bool (B, k_tokens), True for keys to ignore, or None.
    factor: softmax scale · log2 e.
    Outputs: `PreparedQueries` and `SampledStatistics`. Strides are in units of ALIGN elements, `row_stores` is the
    pitch in units of STORE.
    """
    pid = tl.program_id(0)
    if pid < sampling_programs:
        kv_batch_head = pid // SPLITS
        sample_keys_and_values(
            k_ptr=k_ptr, v_ptr=v_ptr, padding_ptr=padding_ptr,
            partial_ptr=partial_ptr, sampled_ptr=sampled_ptr,
            split=pid % SPLITS, kv_batch_head=kv_batch_head, batch=kv_batch_head // kv_heads,
            kv_head=kv_batch_head % kv_heads, k_stride_b=k_stride_b, k_stride_h=k_stride_h, k_stride_n=k_stride_n,
            v_stride_b=v_stride_b, v_stride_h=v_stride_h, v_stride_n=v_stride_n, k_tokens=k_tokens,
            D=D, PADDED_D=PADDED_D, K_ALIGN=K_ALIGN, V_ALIGN=V_ALIGN, TILE=TILE, SAMPLE=SAMPLE, SPLITS=SPLITS)
    else:
        batch_head = (pid - sampling_programs) // q_blocks
        quantise_queries(
            q_ptr=q_ptr, order_ptr=order_ptr, flags_ptr=flags_ptr, factor=factor,
            quantised_ptr=quantised_ptr, scale_ptr=scale_ptr, mean_ptr=mean_ptr, similarity_ptr=similarity_ptr,
            q_block=(pid - sampling_programs) % q_blocks, batch_head=batch_head, batch=batch_head // heads,
            head=batch_head % heads, stride_b=q_stride_b, stride_h=q_stride_h, stride_n=q_stride_n, q_tokens=q_tokens,
            q_blocks=q_blocks, row_stores=row_stores, order_rows=order_rows, group=heads // kv_heads,
            D=D, PADDED_D=PADDED_D, GROUPS=GROUPS, JUDGED=JUDGED, PITCH=PITCH, BLOCK=BLOCK, STORE=STORE, ALIGN=Q_ALIGN)


def prepare_queries(q: Tensor, k: Tensor, v: Tensor | None, *, factor: float, order: Tensor | None,
                    flags: Tensor | None, padding: Tensor | None, block: BlockShape, groups: int = 1,
                    judged: bool = True) -> tuple[PreparedQueries, SampledStatistics]:
    """Pool and quantise q (B, H, Nq, D), and sample k and, if there is one, v (B, Hkv, Nk, D) for `prepare_keys`.

    factor: softmax scale · log2 e, folded into the scales. order: int32 (Nq,) or (Hkv, Nq). flags: int8 (Nq,), 1 for
    dense queries. padding: bool (B, Nk), True for keys to ignore. groups, judged: `CallSpec.mixing_groups` and
    `judges_similarity`.
    """
    (batch, heads, q_tokens, dim), (_, kv_heads, k_tokens, _) = q.shape, k.shape
    q_blocks, pitch, padded, store = -(-q_tokens // block.q), row_pitch(dim), padded_dim(dim), store_bytes(block.q)
    each_block, places = (batch, heads, q_blocks), (batch, heads, q_blocks * block.q)
    splits = (batch, kv_heads, sample.SPLITS)
    v = k if v is None else v
    (q_strides, q_align), (k_strides, k_align), (v_strides, v_align) = (token_strides(x) for x in (q, k, v))
    quantised, scale, mean, similarity, partial, sampled = allocate(
        q.device, ((*places, pitch), torch.int8), (places, torch.float32), ((*each_block, dim), torch.float32),
        (each_block, torch.float32), ((*splits, 4, padded), torch.float32), (splits, torch.int32))
    sampling_programs = batch * kv_heads * sample.SPLITS
    launch(
        _queries_kernel, (sampling_programs + q_blocks * batch * heads,), q.device,
        inputs=dict(q_ptr=q, k_ptr=k, v_ptr=v, order_ptr=order, flags_ptr=flags, padding_ptr=padding, factor=factor),
        outputs=dict(quantised_ptr=quantised, scale_ptr=scale, mean_ptr=mean, similarity_ptr=similarity,
                     partial_ptr=partial, sampled_ptr=sampled),
        sizes=dict(q_stride_b=q_strides[0], q_stride_h=q_strides[1], q_stride_n=q_strides[2],
                   k_stride_b=k_strides[0], k_stride_h=k_strides[1], k_stride_n=k_strides[2],
                   v_stride_b=v_strides[0], v_stride_h=v_strides[1], v_stride_n=v_strides[2],
                   q_tokens=q_tokens, k_tokens=k_tokens, q_blocks=q_blocks, heads=heads, kv_heads=kv_heads,
                   sampling_programs=sampling_programs, row_stores=pitch // store, order_rows=order_rows(order)),
        constants=dict(D=dim, PADDED_D=padded, GROUPS=groups, JUDGED=judged, PITCH=pitch, BLOCK=block.q, STORE=store,
                       Q_ALIGN=q_align, K_ALIGN=k_align, V_ALIGN=v_align,
                       TILE=min(1024 // padded, sample.SAMPLE // sample.SPLITS), SAMPLE=sample.SAMPLE,
                       SPLITS=sample.SPLITS),
        options=dict(num_warps=prepare_warps(block.q, padded)))
    return PreparedQueries(quantised, scale, mean, similarity), SampledStatistics(partial, sampled)

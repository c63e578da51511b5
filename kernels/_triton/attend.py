"""Attend: block-sparse quantised attention over the lists of kept blocks."""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FP8_MAX, INT8_MAX, ROW_GROUP
from ..types import Residual
from .block_lists import BlockLists
from .config import AttendConfig
from .launch import HAS_DESCRIPTORS, descriptor, launch
from .output import Target, write_lse, write_output
from .prepared import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import order_rows, padded_dim, threshold_of, token_strides
from .tiles import load_channels, load_pooled, load_tile


@triton.jit
def mask_scores(scores, scale, k_bias_ptr, k_valid_ptr, kv_offset, k_places, q_places, k_tokens,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores [BLOCK_Q, BLOCK_K] with the bias of the keys and -inf where a query sees no key, and the `scale` [BLOCK_Q]
    that they are still to be multiplied by; kv_offset: the first block of the head."""
    if k_bias_ptr is not None:  # -inf where there is no key
        scores = scores * scale[:, None] + tl.load(k_bias_ptr + kv_offset * BLOCK_K + k_places)[None, :]
        scale = tl.full([BLOCK_Q], 1.0, tl.float32)
    elif k_valid_ptr is not None:
        exists = tl.load(k_valid_ptr + kv_offset * BLOCK_K + k_places) != 0
        scores = tl.where(exists[None, :], scores, float("-inf"))
    else:
        scores = tl.where((k_places < k_tokens)[None, :], scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(k_places[None, :] <= q_places[:, None], scores, float("-inf"))
    return scores, scale


@triton.jit
def online_softmax_update(total, running_max, scores, scores_max, scale, P_SHIFT: tl.constexpr):
    """One step of the online softmax over scores [M, N] times `scale` [M], in log2 units; scores_max [M] is their
    maximum by rows before the scale.

    Returns P [M, N] times 2^P_SHIFT, and of rows [M] the factor that the sums so far shrink by, the denominator, the
    running maximum, and the maximum of this step.
    """
    local_max = scores_max * scale
    new_max = tl.maximum(running_max, local_max)
    p = tl.exp2(scores * scale[:, None] - (new_max - P_SHIFT)[:, None])
    decay = tl.exp2(running_max - new_max)
    return p, decay, total * decay + tl.sum(p, 1), new_max, local_max


@triton.jit
def skip_row_groups(p, local_max, running_max, limit, BLOCK_Q: tl.constexpr, ROW_GROUP: tl.constexpr):
    """The λ test: P [BLOCK_Q, BLOCK_K] with zeros in the groups of rows whose probabilities in this block are all below
    2^-limit of their largest so far, and the number of these groups."""
    below = tl.max(tl.reshape(local_max - running_max, [BLOCK_Q // ROW_GROUP, ROW_GROUP]), 1) < -limit
    n_below = tl.sum(below.to(tl.int32), 0)
    rows_below = tl.reshape(tl.broadcast_to(below[:, None], [BLOCK_Q // ROW_GROUP, ROW_GROUP]), [BLOCK_Q])
    return tl.where(rows_below[:, None], 0.0, p), n_below


@triton.jit
def to_fp8_operand(p, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """P [BLOCK_Q, BLOCK_K] in float8, its columns permuted inside each 16 as the keys of V are stored."""
    p = tl.reshape(p, [BLOCK_Q, BLOCK_K // 16, 2, 4, 2])
    p = tl.reshape(tl.permute(p, [0, 1, 3, 2, 4]), [BLOCK_Q, BLOCK_K])
    return p.to(tl.float8e4nv)


@triton.jit
def add_pooled_tail(
        acc, total, running_max, q, q_scale, pooled_k, pooled_k_scale_ptr, pooled_v, tail_weight_ptr, map_row,
        kv_batch_head, k_blocks,
        BLOCK_Q: tl.constexpr, PADDED_D: tl.constexpr, PITCH: tl.constexpr,
        TAIL_TILE: tl.constexpr, FP8: tl.constexpr, P_SHIFT: tl.constexpr, TMA: tl.constexpr):
    """Add the skipped blocks of a row of the map to acc [BLOCK_Q, PADDED_D] and total [BLOCK_Q]: each is one key, with
    the means of its keys and values. Returns both with the new running maximum [BLOCK_Q]."""
    for start in range(0, k_blocks, TAIL_TILE):  # all of it, without a test for skipped blocks: loads run ahead
        k_block = start + tl.arange(0, TAIL_TILE)  # [TAIL_TILE]
        inside = k_block < k_blocks
        k = load_pooled(source=pooled_k, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, PITCH=PITCH,
                        ROWS=TAIL_TILE, COLS=PADDED_D, TMA=TMA)  # [TAIL_TILE, PADDED_D] int8
        k_scale = tl.load(pooled_k_scale_ptr + kv_batch_head.to(tl.int64) * k_blocks + k_block, mask=inside,
                          other=0.0).to(tl.float32)
        weight = tl.load(tail_weight_ptr + map_row * k_blocks + k_block, mask=inside,
                         other=float("-inf")).to(tl.float32)
        scores = tl.dot(q, tl.trans(k)).to(tl.float32) * k_scale[None, :] * q_scale[:, None] + weight[None, :]
        p, decay, total, running_max, local_max = online_softmax_update(
            total=total, running_max=running_max, scores=scores, scores_max=tl.max(scores, 1),
            scale=tl.full([BLOCK_Q], 1.0, tl.float32), P_SHIFT=P_SHIFT)
        v = load_pooled(source=pooled_v, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, PITCH=PITCH,
                        ROWS=TAIL_TILE, COLS=PADDED_D, TMA=TMA)  # [TAIL_TILE, PADDED_D] float16
        if FP8:
            # A product of its own, which `fma` keeps apart from the sum: accumulated inside it, ptxas runs short of
            # registers for the loops above too and lets every product of the kernel wait for the one before.
            decay = tl.broadcast_to(decay[:, None], [BLOCK_Q, PADDED_D])
            acc = tl.fma(acc, decay, tl.dot(p.to(tl.float16), v))
        else:
            acc = acc * decay[:, None] + tl.dot(p.to(tl.float16), v)
    return acc, total, running_max


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_n", "q_blocks", "k_blocks", "q_tokens", "k_tokens",
                               "heads", "group", "order_rows", "residual_batch", "lse_batch"])
def _attend_kernel(
        # inputs
        q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_centre_ptr, v_block_scale_ptr, k_valid_ptr,
        k_bias_ptr, indices_ptr, counts_ptr, pooled_k_ptr, pooled_k_scale_ptr, pooled_v_ptr, tail_weight_ptr,
        order_ptr, per_head_ptr, pv_threshold, residual_ptr, residual_scale_ptr,
        # outputs
        out_ptr, lse_ptr, skips_ptr, made_ptr, made_scale_ptr,
        # sizes
        stride_b: tl.int64, stride_h: tl.int64, stride_n: tl.int64, q_blocks, k_blocks, q_tokens, k_tokens, heads,
        group, order_rows, residual_batch, lse_batch,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        ALIGN: tl.constexpr, FP8: tl.constexpr, CAUSAL: tl.constexpr, SKIP_PV: tl.constexpr, ROW_GROUP: tl.constexpr,
        TAIL_TILE: tl.constexpr, P_SHIFT: tl.constexpr, TMA: tl.constexpr, INT8_MAX: tl.constexpr):
    """A block of queries a program, over its list of kept blocks; the online softmax in log2 units.

    s = (q · kᵀ) · q_scale · k_scale + k_bias                    of a kept block, -inf where a query sees no key
    m = max(m_before, max s),  p = 2^(s - m + P_SHIFT)
    total = total · 2^(m_before - m) + Σ p
    acc = acc · 2^(m_before - m) + (p · v) · v_block_scale       p in the format of v
    out = acc / total · v_scale + v_centre (+ residual · residual_scale)
    Under SKIP_PV, groups of ROW_GROUP rows with s - m < -pv_threshold leave p · v out, not Σ p. With a pooled tail each
    skipped block is one more key. Source: SpargeAttn (arXiv 2502.18137), sections 3.4 and 3.5.

    Inputs; under TMA, k_ptr, v_ptr, pooled_k_ptr and pooled_v_ptr are descriptors of the same as matrices:
    q_ptr: int8 (B, H, q_blocks · BLOCK_Q, PITCH).
    q_scale_ptr: float32 (B, H, q_blocks · BLOCK_Q), with the softmax scale and log2 e.
    k_ptr: int8 (B, Hkv, k_blocks · BLOCK_K, PITCH).
    k_scale_ptr: float32 (B, Hkv, k_blocks).
    v_ptr: float16 (B, Hkv, k_blocks · BLOCK_K, PITCH), or float8 (B, Hkv, D, k_blocks · BLOCK_K) under FP8.
    v_scale_ptr, v_centre_ptr: float32 (B, Hkv, D), in the units of V.
    v_block_scale_ptr: float32 (B, Hkv, k_blocks), powers of two.
    k_valid_ptr: int8 (B, Hkv, k_blocks · BLOCK_K), whether there is a key, or None.
    k_bias_ptr: float32 (B, Hkv, k_blocks · BLOCK_K), log2, -inf where there is no key, or None.
    indices_ptr: int32 (B, H, q_blocks, k_blocks), kept blocks of K.
    counts_ptr: int32 (B, H, q_blocks, 3), entries that need no care, entries; the third is not read.
    pooled_k_ptr: int8 (B, Hkv, k_blocks, PITCH); pooled_k_scale_ptr: bfloat16 (B, Hkv, k_blocks); or None.
    pooled_v_ptr: float16 (B, Hkv, k_blocks, PITCH), or None.
    tail_weight_ptr: float16 (B, H, q_blocks, k_blocks), log2, -inf for blocks that are not skipped, or None.
    order_ptr: int32 (order_rows, q_tokens), the token at each place of the blocking order, or None.
    per_head_ptr: float32 (3, H), whose last row takes the place of pv_threshold, in log2 units; or None.
    residual_ptr: int8 (B, H, q_tokens, D); residual_scale_ptr: float32 (B, H, q_tokens); or None.
    Outputs:
    out_ptr: (B, H, q_tokens, D), strides in units of ALIGN elements. Beside made_ptr it holds dense attention to read.
    lse_ptr: float32 (B, H, q_tokens), log Σ e^s with the removed constant of K missing, or None.
    skips_ptr: int32 (B, H, q_blocks), row groups whose p · v was left out, or None.
    made_ptr, made_scale_ptr: a residual to make, dense attention less `out`; or None.
    """
    pid = tl.program_id(0)
    q_block, batch_head = pid % q_blocks, pid // q_blocks
    if CAUSAL:
        q_block = q_blocks - 1 - q_block  # long rows first
    batch, head = batch_head // heads, batch_head % heads
    kv_batch_head = batch * (heads // group) + head // group
    map_row = batch_head.to(tl.int64) * q_blocks + q_block
    lane = tl.arange(0, BLOCK_Q)
    q_places = q_block * BLOCK_Q + lane

    q = load_tile(source=q_ptr, row=map_row * BLOCK_Q, PITCH=PITCH, ROWS=BLOCK_Q, COLS=PADDED_D,
                  TMA=False)  # [BLOCK_Q, PADDED_D] int8
    q_scale = tl.load(q_scale_ptr + map_row * BLOCK_Q + lane)  # [BLOCK_Q]
    limit = threshold_of(per_head_ptr=per_head_ptr, ROW=2, head=head, heads=heads, value=pv_threshold)
    acc = tl.zeros([BLOCK_Q, PADDED_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    running_max = tl.full([BLOCK_Q], -1e30, tl.float32)
    n_skipped = 0
    kv_offset = kv_batch_head.to(tl.int64) * k_blocks
    k_scale_ptr += kv_offset
    indices_ptr += map_row * k_blocks
    n_plain = tl.load(counts_ptr + map_row * 3)
    n_kept = tl.load(counts_ptr + map_row * 3 + 1)

    # Blocks that need no care come first in the list, in a loop of their own.
    for CARE in tl.static_range(2):
        first = n_plain if CARE else 0
        last = n_kept if CARE else n_plain
        # K's scale comes one entry ahead: loaded where it is used, it is pipelined through shared memory at a barrier.
        next_scale = tl.load(k_scale_ptr + tl.load(indices_ptr + first, mask=first < n_kept, other=0))
        for entry in range(first, last):
            k_block = tl.load(indices_ptr + entry)
            k_scale = next_scale
            next_scale = tl.load(k_scale_ptr + tl.load(indices_ptr + entry + 1, mask=entry + 1 < n_kept, other=0))
            k = load_tile(source=k_ptr, row=(kv_batch_head * k_blocks + k_block) * BLOCK_K, PITCH=PITCH, ROWS=BLOCK_K,
                          COLS=PADDED_D, TMA=TMA)  # [BLOCK_K, PADDED_D] int8
            products = tl.dot(q, tl.trans(k))  # [BLOCK_Q, BLOCK_K] int32
            scores = products.to(tl.float32)
            scale = q_scale * k_scale  # [BLOCK_Q]
            if CARE:
                scores, scale = mask_scores(
                    scores=scores, scale=scale, k_bias_ptr=k_bias_ptr, k_valid_ptr=k_valid_ptr,
                    kv_offset=kv_offset, k_places=k_block * BLOCK_K + tl.arange(0, BLOCK_K), q_places=q_places,
                    k_tokens=k_tokens, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, CAUSAL=CAUSAL)
                scores_max = tl.max(scores, 1)
            else:
                scores_max = tl.max(products, 1).to(tl.float32)  # of integers: three in one instruction on sm90
            p, decay, total, running_max, local_max = online_softmax_update(
                total=total, running_max=running_max, scores=scores, scores_max=scores_max, scale=scale,
                P_SHIFT=P_SHIFT)
            if CARE:
                v_block_scale = tl.load(v_block_scale_ptr + kv_offset + k_block)
                if not FP8:  # the sums are brought to the unit of this block's values and back
                    decay /= v_block_scale
            acc *= decay[:, None]
            n_below = 0
            if SKIP_PV:
                p, n_below = skip_row_groups(p=p, local_max=local_max, running_max=running_max, limit=limit,
                                             BLOCK_Q=BLOCK_Q, ROW_GROUP=ROW_GROUP)
                n_skipped += n_below
                if CARE:  # values that are not finite reach every row
                    n_below = tl.where(v_block_scale == v_block_scale, n_below, 0)
            if n_below < BLOCK_Q // ROW_GROUP:
                if FP8:
                    v = load_channels(source=v_ptr, row=kv_batch_head * D, column=k_block * BLOCK_K,
                                      pitch=k_blocks * BLOCK_K, ROWS=PADDED_D, COLS=BLOCK_K, LIMIT=D,
                                      TMA=TMA)  # [PADDED_D, BLOCK_K] float8
                    # Not accumulated inside the product: FP8 tensor cores keep 14 bits of a sum, and truncate.
                    product = tl.dot(to_fp8_operand(p=p, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K), tl.trans(v),
                                     max_num_imprecise_acc=BLOCK_K)
                    acc += product * v_block_scale if CARE else product
                else:
                    v = load_tile(source=v_ptr, row=(kv_batch_head * k_blocks + k_block) * BLOCK_K, PITCH=PITCH,
                                  ROWS=BLOCK_K, COLS=PADDED_D, TMA=TMA)  # [BLOCK_K, PADDED_D] float16
                    acc = tl.dot(p.to(tl.float16), v, acc)
            if CARE and not FP8:
                acc *= v_block_scale

    if pooled_k_ptr is not None:
        acc, total, running_max = add_pooled_tail(
            acc=acc, total=total, running_max=running_max, q=q, q_scale=q_scale, pooled_k=pooled_k_ptr,
            pooled_k_scale_ptr=pooled_k_scale_ptr, pooled_v=pooled_v_ptr,
            tail_weight_ptr=tail_weight_ptr, map_row=map_row, kv_batch_head=kv_batch_head, k_blocks=k_blocks,
            BLOCK_Q=BLOCK_Q, PADDED_D=PADDED_D, PITCH=PITCH, TAIL_TILE=TAIL_TILE, FP8=FP8, P_SHIFT=P_SHIFT, TMA=TMA)

    write_output(
        acc=acc, total=total, v_scale_ptr=v_scale_ptr, v_centre_ptr=v_centre_ptr, order_ptr=order_ptr,
        residual_ptr=residual_ptr, residual_scale_ptr=residual_scale_ptr, out_ptr=out_ptr, made_ptr=made_ptr,
        made_scale_ptr=made_scale_ptr, kv_batch_head=kv_batch_head, batch=batch, head=head, group=group,
        order_rows=order_rows, q_places=q_places, stride_b=stride_b, stride_h=stride_h, stride_n=stride_n,
        q_tokens=q_tokens, residual_batch=residual_batch, D=D, PADDED_D=PADDED_D, ALIGN=ALIGN, INT8_MAX=INT8_MAX)
    if lse_ptr is not None:
        write_lse(total=total, running_max=running_max, order_ptr=order_ptr, lse_ptr=lse_ptr, batch=batch, head=head,
                  group=group, order_rows=order_rows, q_places=q_places, q_tokens=q_tokens, lse_batch=lse_batch,
                  P_SHIFT=P_SHIFT)
    if skips_ptr is not None:
        tl.store(skips_ptr + map_row, n_skipped)


def attend(queries: PreparedQueries, keys: PreparedKeys, values: PreparedValues, lists: BlockLists, target: Target, *,
           residual: Residual | None, k_tokens: int, order: Tensor | None, per_head: Tensor | None,
           pv_threshold: float, causal: bool, config: AttendConfig, count_skips: bool) -> Tensor | None:
    """Write the attention of prepared tensors, with the residual added, into its target.

    Returns int32 (B, H, q_blocks), the row groups whose P·V was skipped; None where the λ test is off or not counted.
    """
    out, made, lse = target.out, target.residual, target.lse
    batch, heads, q_tokens, dim = out.shape
    kv_heads, k_blocks = keys.similarity.shape[1:]
    q_blocks, pitch, padded = queries.similarity.shape[2], keys.quantised.shape[-1], padded_dim(dim)
    block, fp8 = config.block, values.values.dtype == torch.float8_e4m3fn
    skip_pv = pv_threshold < float("inf")
    skips = None
    if skip_pv and count_skips:
        skips = torch.empty((batch, heads, q_blocks), dtype=torch.int32, device=out.device)
    k, v, pooled_k, pooled_v = keys.quantised, values.values, keys.pooled, values.pooled
    tma = config.tma and HAS_DESCRIPTORS
    if tma:
        rows = batch * kv_heads
        k = descriptor(k, rows * k_blocks * block.k, pitch, [block.k, padded])
        v = (descriptor(v, rows * dim, k_blocks * block.k, [padded, block.k]) if fp8 else
             descriptor(v, rows * k_blocks * block.k, pitch, [block.k, padded]))
        if pooled_k is not None:
            tile = [config.tail_tile, padded]
            pooled_k, pooled_v = (descriptor(x, rows * k_blocks, pitch, tile) for x in (pooled_k, pooled_v))
    strides, align = token_strides(out)
    stored = residual or made
    launch(
        _attend_kernel, (q_blocks * batch * heads,), out.device,
        inputs=dict(q_ptr=queries.quantised, q_scale_ptr=queries.scale, k_ptr=k, k_scale_ptr=keys.scale, v_ptr=v,
                    v_scale_ptr=values.scale, v_centre_ptr=values.centre, v_block_scale_ptr=values.block_scale,
                    k_valid_ptr=keys.valid, k_bias_ptr=keys.bias, indices_ptr=lists.indices, counts_ptr=lists.counts,
                    pooled_k_ptr=pooled_k, pooled_k_scale_ptr=keys.pooled_scale, pooled_v_ptr=pooled_v,
                    tail_weight_ptr=lists.tail, order_ptr=order, per_head_ptr=per_head, pv_threshold=pv_threshold,
                    residual_ptr=residual and residual.quantised, residual_scale_ptr=residual and residual.scale),
        outputs=dict(out_ptr=out, lse_ptr=lse, skips_ptr=skips, made_ptr=made and made.quantised,
                     made_scale_ptr=made and made.scale),
        sizes=dict(stride_b=strides[0], stride_h=strides[1], stride_n=strides[2], q_blocks=q_blocks,
                   k_blocks=k_blocks, q_tokens=q_tokens, k_tokens=k_tokens, heads=heads, group=heads // kv_heads,
                   order_rows=order_rows(order), residual_batch=stored.rows_a_batch if stored else 0,
                   lse_batch=0 if lse is None else lse.stride(0)),
        constants=dict(D=dim, PADDED_D=padded, PITCH=pitch, BLOCK_Q=block.q, BLOCK_K=block.k, ALIGN=align, FP8=fp8,
                       CAUSAL=causal, SKIP_PV=skip_pv, ROW_GROUP=ROW_GROUP, TAIL_TILE=config.tail_tile,
                       P_SHIFT=math.log2(FP8_MAX) if fp8 else 0.0, TMA=tma, INT8_MAX=INT8_MAX),
        options=config.options())
    return skips

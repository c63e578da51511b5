"""Attend: block-sparse quantised attention over the lists of kept blocks."""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import INT8_MAX, ROW_GROUP
from ..triton_package import triton_version
from ..types import Residual
from .block_lists import BlockLists
from .config import AttendConfig
from .launch import HAS_DESCRIPTORS, Region, TensorDescriptor, allocate, descriptor, launch
from .output import Target, write_lse, write_output
from .pooled_tail import add_pooled_tail
from .prepared import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import channel_tiles, order_rows, padded_dim, threshold_of, token_strides, warp_uniform
from .products import plus_values, rescaled, times_keys
from .softmax import (
    INT8_UNIT,
    SUMS_BY_LANE,
    beside_sums,
    frozen_max,
    mask_scores,
    not_all,
    online_softmax_update,
    rounding_bytes,
    rows_below,
    sums_by_lane,
    to_int8_operand,
)
from .tiles import load_tile

# Where the sum of P of a row, relative to the maximum of its first block, is beyond this, its maximum may have risen so
# far (by 2^32) that P·V leaves float32.
_MOST_TOTAL = tl.constexpr(2.0 ** 39)
# In float16 with a frozen maximum P stays below the largest float16 where its sum does, and below the least sum small
# probabilities would be lost. Sums over many keys are larger without such a P, which would leave infinity in acc.
_MOST_FROZEN, _LEAST_FROZEN = tl.constexpr(60000.0), tl.constexpr(0.25)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_n", "q_blocks", "k_blocks", "q_tokens", "k_tokens",
                               "heads", "group", "order_rows", "residual_batch", "lse_batch"])
def _attend_kernel(
        # inputs
        q_ptr, q_scale_ptr, k_ptr, k_rest_ptr, k_scale_ptr, v_ptr, v_rest_ptr, v_scale_ptr, v_centre_ptr,
        v_block_scale_ptr, v_channel_scale_ptr, v_plain_scale, k_valid_ptr, k_bias_ptr, indices_ptr, counts_ptr,
        pooled_k_ptr, pooled_k_rest_ptr, pooled_terms_ptr, pooled_v_ptr, pooled_v_rest_ptr, skipped_ptr,
        order_ptr, per_head_ptr, pv_threshold, residual_ptr, residual_scale_ptr, lead,
        # outputs
        out_ptr, lse_ptr, skips_ptr, made_ptr, made_scale_ptr,
        # sizes
        stride_b: tl.int64, stride_h: tl.int64, stride_n: tl.int64, q_blocks, k_blocks, q_tokens, k_tokens, heads,
        group, order_rows, residual_batch, lse_batch,
        # constants
        D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PITCH: tl.constexpr, BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, PV_INT8: tl.constexpr, KEY_GROUP: tl.constexpr,
        FP16_SUMS: tl.constexpr, FROZEN: tl.constexpr, CAUSAL: tl.constexpr, SKIP_PV: tl.constexpr,
        ROW_GROUP: tl.constexpr, TAIL_TILE: tl.constexpr, TAIL_STAGES: tl.constexpr, P_SHIFT: tl.constexpr,
        P_UNIT: tl.constexpr, TMA: tl.constexpr, INT8_MAX: tl.constexpr):
    """A block of queries a program, over its list of kept blocks; the online softmax in log2 units.

    s = (q · kᵀ) · q_scale · k_scale + k_bias                    of a kept block, -inf where a query sees no key
    float16: m = max(m_before, max s),  p = 2^(s - m)            relative to the maximum of the row so far
             acc = acc · 2^(m_before - m) + (p · v) · v_block_scale     p · v summed in float16 under FP16_SUMS
    FROZEN:  m = max s over the keys at the row's own place and a block more,  p = 2^(s - m),  acc = acc + p · v
    int8:    p = ⌊127 · 2^(s - max s) + u⌋, 0 ≤ u < 1            relative to the maximum of the row in this block
             acc = acc + (p · v) · 2^(max s - m) · v_block_scale
    total likewise, with Σ p for p · v
    out = acc / total · v_scale + v_centre (+ residual · residual_scale)
    In int8, m is the maximum of the row in its first block, and nothing ever waits for the sums: float32 has the range.
    Nor does it with a frozen maximum, where products even run on while the next block's probabilities are made.
    Programs with a row whose sum leaves the range that either needs (in int8, its maximum rises by 2^32), and blocks
    that need care, are summed as in float16.
    Under SKIP_PV, groups of ROW_GROUP rows whose s all lie pv_threshold below their maximum so far leave p · v out, not
    Σ p. With a pooled tail each skipped block is one more key.
    Source: SpargeAttn (arXiv 2502.18137), sections 3.4 and 3.5.

    Channels come as one tile of MAIN or two of MAIN and REST, see `channel_tiles`.

    Inputs; under TMA, k_ptr, v_ptr, pooled_k_ptr and pooled_v_ptr are descriptors of the same as matrices, in tiles of
    MAIN channels. k_rest_ptr and the like are the same in tiles of REST channels, None without:
    q_ptr: int8 (B, H, q_blocks · BLOCK_Q, PITCH).
    q_scale_ptr: float32 (B, H, q_blocks · BLOCK_Q), with the softmax scale and log2 e.
    k_ptr: int8 (B, Hkv, k_blocks · BLOCK_K, PITCH).
    k_scale_ptr: float32 (B, Hkv, k_blocks).
    v_ptr: float16 (B, Hkv, k_blocks · BLOCK_K, PITCH), or int8 (B, Hkv, D, k_blocks · BLOCK_K) under PV_INT8.
    v_scale_ptr, v_centre_ptr: float32 (B, Hkv, D), in the units of V.
    v_block_scale_ptr, v_channel_scale_ptr: float32 (B, Hkv, k_blocks) and (B, Hkv, k_blocks, D), the latter where the
        former is above v_plain_scale, see `PreparedValues`; None beside float16.
    k_valid_ptr: int8 (B, Hkv, k_blocks · BLOCK_K), whether there is a key, or None.
    k_bias_ptr: float32 (B, Hkv, k_blocks · BLOCK_K), log2, -inf where there is no key, or None.
    indices_ptr: int32 (B, H, q_blocks, k_blocks), kept blocks of K.
    counts_ptr: int32 (B, H, q_blocks, 3), entries that need no care, entries; the third is not read.
    pooled_k_ptr, pooled_terms_ptr, pooled_v_ptr, skipped_ptr: pooled and pooled_terms of `PreparedKeys`, pooled of
        `PreparedValues`, skipped of `BlockLists`; None where skipped blocks are dropped.
    order_ptr: int32 (order_rows, q_tokens), the token at each place of the blocking order, or None.
    per_head_ptr: float32 (3, H), whose last row takes the place of pv_threshold, in log2 units; or None.
    residual_ptr: int8 (B, H, q_tokens, D); residual_scale_ptr: float32 (B, H, q_tokens); or None. Beside made_ptr an
        earlier residual.
    Outputs:
    out_ptr: (B, H, q_tokens, D), strides in units of ALIGN elements. Beside made_ptr it holds dense attention to read.
    lse_ptr: float32 (B, H, q_tokens), log Σ e^s with the removed constant of K missing, or None.
    skips_ptr: int32 (B, H, q_blocks), row groups whose p · v was left out, or None.
    made_ptr, made_scale_ptr: a residual to make, dense attention less `out`, and `lead` times its distance from the
        earlier one more if there is one; or None.
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

    q = load_tile(source=q_ptr, row=map_row * BLOCK_Q, PITCH=PITCH, ROWS=BLOCK_Q, FIRST=0, COLS=MAIN,
                  TMA=False)  # [BLOCK_Q, MAIN] int8
    q_rest = q
    if REST:
        q_rest = load_tile(source=q_ptr, row=map_row * BLOCK_Q, PITCH=PITCH, ROWS=BLOCK_Q, FIRST=MAIN, COLS=REST,
                           TMA=False)  # [BLOCK_Q, REST] int8
    q_scale = tl.load(q_scale_ptr + map_row * BLOCK_Q + lane)  # [BLOCK_Q]
    limit = threshold_of(per_head_ptr=per_head_ptr, ROW=2, head=head, heads=heads, value=pv_threshold)
    acc = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_Q, REST if REST else 1], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    lane_total = tl.zeros([BLOCK_Q, 4], tl.float32)  # what the plain loop adds to it, each lane for itself
    running_max = tl.full([BLOCK_Q], -1e30, tl.float32)
    highest = running_max
    n_skipped = 0
    kv_offset = kv_batch_head.to(tl.int64) * k_blocks
    k_scale_ptr += kv_offset
    v_block_scale_ptr += kv_offset
    indices_ptr += map_row * k_blocks
    n_plain = tl.load(counts_ptr + map_row * 3)
    n_kept = tl.load(counts_ptr + map_row * 3 + 1)

    # Blocks that need no care come first in the list, in a loop of their own.
    for CARE in tl.static_range(2):
        first = n_plain if CARE else 0
        last = n_kept if CARE else n_plain
        if (PV_INT8 or FROZEN) and CARE:
            # Where a maximum rose too far, which is rare, this loop takes all blocks; a lane of zeros then makes NaN.
            total += tl.sum(lane_total, 1)
            if PV_INT8:
                again = not_all(total <= _MOST_TOTAL)
            else:
                again = not_all((total <= _MOST_FROZEN) & (total >= _LEAST_FROZEN))
                if again:
                    nothing = tl.sum(acc * 0.0, 1)  # NaN where a sum is infinite
                    if REST:
                        nothing += tl.sum(acc_rest * 0.0, 1)
                    again = not_all((total >= _LEAST_FROZEN) & (nothing == 0.0))
            first = warp_uniform(tl.where(again, 0, first), PTX=P_UNIT != 0)
            acc = tl.where(again, 0.0, acc)
            if REST:
                acc_rest = tl.where(again, 0.0, acc_rest)
            total = tl.where(again, 0.0, total)
            running_max = tl.where(again, -1e30, running_max)
            highest = tl.where(again, -1e30, highest)
            n_skipped = tl.where(again, 0, n_skipped)
        # Scales come one entry ahead: loaded where they are used, they would wait for shared memory at a barrier.
        next_block = tl.load(indices_ptr + first, mask=first < n_kept, other=0)
        next_k_scale = tl.load(k_scale_ptr + next_block)
        next_v_scale = tl.load(v_block_scale_ptr + next_block)
        if FROZEN and not CARE:
            running_max = frozen_max(
                q=q, q_rest=q_rest, q_scale=q_scale, k_ptr=k_ptr, k_rest_ptr=k_rest_ptr, k_scale_ptr=k_scale_ptr,
                q_block=q_block, first_block=next_block, kv_batch_head=kv_batch_head, k_blocks=k_blocks,
                BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, MAIN=MAIN, REST=REST, PITCH=PITCH, TMA=TMA)
        for entry in range(first, last):
            k_block, k_scale, v_scale = next_block, next_k_scale, next_v_scale
            next_block = tl.load(indices_ptr + entry + 1, mask=entry + 1 < n_kept, other=0)
            next_k_scale = tl.load(k_scale_ptr + next_block)
            if PV_INT8 or CARE:
                next_v_scale = tl.load(v_block_scale_ptr + next_block)
            products = times_keys(
                q=q, q_rest=q_rest, k_ptr=k_ptr, k_rest_ptr=k_rest_ptr,
                row=(kv_batch_head * k_blocks + k_block) * BLOCK_K, BLOCK_K=BLOCK_K, MAIN=MAIN, REST=REST, PITCH=PITCH,
                TMA=TMA)  # [BLOCK_Q, BLOCK_K] int32
            scores = products.to(tl.float32)
            scale = q_scale * k_scale  # [BLOCK_Q]
            if CARE:
                scores, scale = mask_scores(
                    scores=scores, scale=scale, k_bias_ptr=k_bias_ptr, k_valid_ptr=k_valid_ptr,
                    kv_offset=kv_offset, k_places=k_block * BLOCK_K + tl.arange(0, BLOCK_K), q_places=q_places,
                    k_tokens=k_tokens, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, CAUSAL=CAUSAL)
                scores_max = tl.max(scores, 1)
            elif not FROZEN:
                scores_max = tl.max(products, 1).to(tl.float32)  # of integers: three in one instruction on sm90
            factor, by_channel = scale, False  # of INT8 alone
            if PV_INT8:
                local_max = scores_max * scale
                if SKIP_PV:
                    highest = tl.maximum(highest, local_max)
                # Of a row without a key -inf is none; a maximum with a number would lose NaN.
                block_max = tl.where(local_max < -1e30, -1e30, local_max) if CARE else local_max
                block_max += tl.abs(block_max) * 2.0 ** -22  # so that rounding takes no P above 127
                if CARE:
                    before = running_max
                    running_max = tl.maximum(before, block_max)
                    decay = tl.exp2(before - running_max)
                    acc, acc_rest = rescaled(acc=acc, acc_rest=acc_rest, factor=decay, REST=REST)
                    total *= decay
                else:
                    running_max = tl.where(entry == 0, block_max, running_max)
                p = tl.exp2(scores * scale[:, None] - (block_max - (P_SHIFT + P_UNIT))[:, None])
                operand, sums = to_int8_operand(p=p, row_bytes=rounding_bytes(block_max), BLOCK_Q=BLOCK_Q,
                                                BLOCK_K=BLOCK_K, KEY_GROUP=KEY_GROUP, P_UNIT=P_UNIT)
                factor = tl.exp2(block_max - running_max)
                if CARE or lse_ptr is not None:  # integers lose a bias that is NaN, and small probabilities
                    total += tl.sum(p, 1) * (factor * 2.0 ** -P_UNIT)
                else:
                    lane_total += sums.to(tl.float32) * beside_sums(factor, BLOCK_Q, BLOCK_K, KEY_GROUP)
                by_channel = v_scale > v_plain_scale  # in the careful loop alone
                factor *= tl.where(by_channel, 1.0, v_scale) if CARE else v_scale
            elif FROZEN and not CARE:
                p = tl.exp2(scores * scale[:, None] - running_max[:, None])
                if SUMS_BY_LANE:
                    lane_total += sums_by_lane(p, BLOCK_Q, BLOCK_K)
                else:
                    total += tl.sum(p, 1)
            else:
                p, decay, total, running_max, local_max = online_softmax_update(
                    total=total, running_max=running_max, scores=scores, scores_max=scores_max, scale=scale,
                    P_SHIFT=P_SHIFT)
                highest = running_max
                if CARE and not FP16_SUMS:  # the sums are brought to the unit of this block's values and back
                    decay /= v_scale
                acc, acc_rest = rescaled(acc=acc, acc_rest=acc_rest, factor=decay, REST=REST)
            n_below = 0
            if SKIP_PV:
                # Values that are not finite reach every row.
                block_limit = tl.where(v_scale == v_scale, limit, float("inf")) if CARE else limit
                below, n_below = rows_below(local_max=local_max, highest=highest, limit=block_limit, BLOCK_Q=BLOCK_Q,
                                            ROW_GROUP=ROW_GROUP)
                n_skipped += n_below
                if PV_INT8:
                    factor = tl.where(below, 0.0, factor)
                else:
                    p = tl.where(below[:, None], 0.0, p)
            if not PV_INT8:
                operand = p
            if n_below < BLOCK_Q // ROW_GROUP:
                acc, acc_rest = plus_values(
                    acc=acc, acc_rest=acc_rest, p=operand, factor=factor, v_ptr=v_ptr, v_rest_ptr=v_rest_ptr,
                    v_scale=v_scale, v_channel_scale_ptr=v_channel_scale_ptr, by_channel=by_channel,
                    kv_batch_head=kv_batch_head, k_block=k_block, k_blocks=k_blocks, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K,
                    MAIN=MAIN, REST=REST, D=D, PITCH=PITCH, PV_INT8=PV_INT8, FP16_SUMS=FP16_SUMS, CARE=CARE, TMA=TMA)
            if CARE and not (PV_INT8 or FP16_SUMS):
                acc *= v_scale
                if REST:
                    acc_rest *= v_scale

    if pooled_k_ptr is not None:
        acc, acc_rest, total, running_max = add_pooled_tail(
            acc=acc, acc_rest=acc_rest, total=total, running_max=running_max, q=q, q_rest=q_rest, q_scale=q_scale,
            pooled_k=pooled_k_ptr, pooled_k_rest=pooled_k_rest_ptr, pooled_terms_ptr=pooled_terms_ptr,
            pooled_v=pooled_v_ptr, pooled_v_rest=pooled_v_rest_ptr, skipped_ptr=skipped_ptr, map_row=map_row,
            kv_batch_head=kv_batch_head, k_blocks=k_blocks, BLOCK_Q=BLOCK_Q, MAIN=MAIN, REST=REST, PITCH=PITCH,
            TAIL_TILE=TAIL_TILE, TAIL_STAGES=TAIL_STAGES, P_SHIFT=P_SHIFT, TMA=TMA)

    write_output(
        acc=acc, acc_rest=acc_rest, total=total, v_scale_ptr=v_scale_ptr, v_centre_ptr=v_centre_ptr,
        order_ptr=order_ptr, residual_ptr=residual_ptr, residual_scale_ptr=residual_scale_ptr, lead=lead,
        out_ptr=out_ptr, made_ptr=made_ptr, made_scale_ptr=made_scale_ptr, kv_batch_head=kv_batch_head, batch=batch,
        head=head, group=group, order_rows=order_rows, q_places=q_places, stride_b=stride_b, stride_h=stride_h,
        stride_n=stride_n, q_tokens=q_tokens, residual_batch=residual_batch, D=D, MAIN=MAIN, REST=REST, ALIGN=ALIGN,
        INT8_MAX=INT8_MAX)
    if lse_ptr is not None:
        write_lse(total=total, running_max=running_max, order_ptr=order_ptr, lse_ptr=lse_ptr, batch=batch, head=head,
                  group=group, order_rows=order_rows, q_places=q_places, q_tokens=q_tokens, lse_batch=lse_batch,
                  P_SHIFT=P_SHIFT)
    if skips_ptr is not None:
        tl.store(skips_ptr + map_row, n_skipped)


def _tail_stages(config: AttendConfig, pv_int8: bool) -> int | None:
    """Stages of the pooled tail's loads; None, which Triton 3.2 does not take, for as many as in the other loops."""
    if pv_int8 and triton_version() == (3, 5):  # with more, ptxas lets all products of the call wait
        return 1
    return config.stages if triton_version() == (3, 2) else None


def attend(queries: PreparedQueries, keys: PreparedKeys, values: PreparedValues, lists: BlockLists, target: Target, *,
           residual: Residual | None, lead: float, k_tokens: int, order: Tensor | None, per_head: Tensor | None,
           pv_threshold: float, causal: bool, predicted: bool, config: AttendConfig,
           count_skips: bool) -> Region | None:
    """Write the attention of prepared tensors, with the residual added, into its target; or make one, led by `lead`
    beyond an earlier `residual`.

    predicted: whether the lists are of a predicted map, which nearly always keeps the keys at a query's own place.
    Returns int32 (B, H, q_blocks), the row groups whose P·V was skipped; None where the λ test is off or not counted.
    """
    out, made, lse = target.out, target.residual, target.lse
    batch, heads, q_tokens, dim = out.shape
    kv_heads, k_blocks = keys.similarity.shape[1:]
    q_blocks, pitch = queries.similarity.shape[2], keys.quantised.shape[-1]
    block, pv_int8 = config.block, values.values.dtype == torch.int8
    skip_pv = pv_threshold < float("inf")
    skips = None
    if skip_pv and count_skips:
        skips, = allocate(out.device, ((batch, heads, q_blocks), torch.int32))
    # Two products inside the branch of the λ test come out wrong in 16 bits with Triton 3.6.
    tiles = (padded_dim(dim), 0) if skip_pv else channel_tiles(dim)
    rows, tma = batch * kv_heads, config.tma and HAS_DESCRIPTORS

    def in_tiles(x: Region | None, rows: int, pitch: int, *tile: int) -> Region | TensorDescriptor | None:
        """x as the kernel takes it, None for tiles without channels."""
        if x is None or 0 in tile:
            return None
        return descriptor(x, rows, pitch, [*tile]) if tma else x

    k, k_rest = (in_tiles(keys.quantised, rows * k_blocks * block.k, pitch, block.k, n) for n in tiles)
    if pv_int8:
        v, v_rest = (in_tiles(values.values, rows * dim, k_blocks * block.k, n, block.k) for n in tiles)
    else:
        v, v_rest = (in_tiles(values.values, rows * k_blocks * block.k, pitch, block.k, n) for n in tiles)
    pooled_k, pooled_k_rest = (in_tiles(keys.pooled, rows * k_blocks, pitch, config.tail_tile, n) for n in tiles)
    pooled_v, pooled_v_rest = (in_tiles(values.pooled, rows * k_blocks, pitch, config.tail_tile, n) for n in tiles)
    # Causal rows see their own keys with care only, and other keys than the queries' have no place in common with them.
    frozen = predicted and not (pv_int8 or config.fp16_sums or skip_pv or causal) and q_tokens == k_tokens
    strides, align = token_strides(out)
    stored = residual or made
    launch(
        _attend_kernel, (q_blocks * batch * heads,), out.device,
        inputs=dict(q_ptr=queries.quantised, q_scale_ptr=queries.scale, k_ptr=k, k_rest_ptr=k_rest,
                    k_scale_ptr=keys.scale, v_ptr=v, v_rest_ptr=v_rest, v_scale_ptr=values.scale,
                    v_centre_ptr=values.centre, v_block_scale_ptr=values.block_scale,
                    v_channel_scale_ptr=values.channel_scale, v_plain_scale=values.plain_scale,
                    k_valid_ptr=keys.valid, k_bias_ptr=keys.bias, indices_ptr=lists.indices, counts_ptr=lists.counts,
                    pooled_k_ptr=pooled_k, pooled_k_rest_ptr=pooled_k_rest, pooled_terms_ptr=keys.pooled_terms,
                    pooled_v_ptr=pooled_v, pooled_v_rest_ptr=pooled_v_rest, skipped_ptr=lists.skipped,
                    order_ptr=order, per_head_ptr=per_head, pv_threshold=pv_threshold,
                    residual_ptr=residual and residual.quantised, residual_scale_ptr=residual and residual.scale,
                    lead=lead),
        outputs=dict(out_ptr=out, lse_ptr=lse, skips_ptr=skips, made_ptr=made and made.quantised,
                     made_scale_ptr=made and made.scale),
        sizes=dict(stride_b=strides[0], stride_h=strides[1], stride_n=strides[2], q_blocks=q_blocks,
                   k_blocks=k_blocks, q_tokens=q_tokens, k_tokens=k_tokens, heads=heads, group=heads // kv_heads,
                   order_rows=order_rows(order), residual_batch=stored.rows_a_batch if stored else 0,
                   lse_batch=0 if lse is None else lse.stride(0)),
        constants=dict(D=dim, MAIN=tiles[0], REST=tiles[1], PITCH=pitch, BLOCK_Q=block.q, BLOCK_K=block.k, ALIGN=align,
                       PV_INT8=pv_int8, KEY_GROUP=config.key_group, FP16_SUMS=config.fp16_sums, FROZEN=frozen,
                       CAUSAL=causal, SKIP_PV=skip_pv, ROW_GROUP=ROW_GROUP, TAIL_TILE=config.tail_tile,
                       TAIL_STAGES=_tail_stages(config, pv_int8),
                       P_SHIFT=math.log2(INT8_MAX) if pv_int8 else 0.0,
                       P_UNIT=INT8_UNIT if pv_int8 and config.ptx else 0, TMA=tma, INT8_MAX=INT8_MAX),
        options=config.options())
    return skips

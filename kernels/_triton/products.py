"""The two products of a block pair, whose channels come as one tile or as two.

A tile has a power of two of channels. Two of them, MAIN and REST, hold 96 channels without the 32 zeros that one would
have, 160 and 192 without 96 and 64. REST is 0 where there is one, and what is of the second tile then has no meaning.
"""
import triton
import triton.language as tl

from .tiles import load_channels, load_tile


@triton.jit
def times_keys(q, q_rest, k_ptr, k_rest_ptr, row, BLOCK_K: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
               PITCH: tl.constexpr, TMA: tl.constexpr):
    """Q·Kᵀ with the keys from `row` on, int32 [BLOCK_Q, BLOCK_K]; q, q_rest: int8 [BLOCK_Q, MAIN or REST]."""
    k = load_tile(source=k_ptr, row=row, PITCH=PITCH, ROWS=BLOCK_K, FIRST=0, COLS=MAIN, TMA=TMA)
    if REST:
        k_rest = load_tile(source=k_rest_ptr, row=row, PITCH=PITCH, ROWS=BLOCK_K, FIRST=MAIN, COLS=REST, TMA=TMA)
    products = tl.dot(q, tl.trans(k))
    if REST:
        products = tl.dot(q_rest, tl.trans(k_rest), products, out_dtype=tl.int32)
    return products


@triton.jit
def plus_values(acc, acc_rest, p, factor, v_ptr, v_rest_ptr, v_scale, v_channel_scale_ptr, by_channel, kv_batch_head,
                k_block, k_blocks, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MAIN: tl.constexpr,
                REST: tl.constexpr, D: tl.constexpr, PITCH: tl.constexpr, PV_INT8: tl.constexpr,
                FP16_SUMS: tl.constexpr, CARE: tl.constexpr, TMA: tl.constexpr):
    """acc [BLOCK_Q, MAIN] and acc_rest [BLOCK_Q, REST] plus P·V of a block.

    p: [BLOCK_Q, BLOCK_K], int8 under PV_INT8, else float32, which is rounded to float16. factor: of the product's rows,
    [BLOCK_Q], under PV_INT8. v_scale: of the block, under FP16_SUMS and CARE. v_channel_scale_ptr: float32
    (B, Hkv, k_blocks, D), of each channel where by_channel, under PV_INT8 and CARE.
    """
    v = _load_values(v_ptr, kv_batch_head, k_block, k_blocks, BLOCK_K, 0, MAIN, D, PITCH, PV_INT8, TMA)
    if REST:
        v_rest = _load_values(v_rest_ptr, kv_batch_head, k_block, k_blocks, BLOCK_K, MAIN, REST, D, PITCH, PV_INT8, TMA)
    scale_ptr = v_channel_scale_ptr
    if PV_INT8 and CARE:
        scale_ptr += (kv_batch_head.to(tl.int64) * k_blocks + k_block) * D
    acc = _plus_product(acc, p, v, factor, v_scale, scale_ptr, by_channel, BLOCK_Q, 0, MAIN, D, PV_INT8, FP16_SUMS,
                        CARE)
    if REST:
        acc_rest = _plus_product(acc_rest, p, v_rest, factor, v_scale, scale_ptr, by_channel, BLOCK_Q, MAIN, REST, D,
                                 PV_INT8, FP16_SUMS, CARE)
    return acc, acc_rest


@triton.jit
def rescaled(acc, acc_rest, factor, REST: tl.constexpr):
    """acc [BLOCK_Q, MAIN] and acc_rest [BLOCK_Q, REST] times a factor [BLOCK_Q]."""
    return acc * factor[:, None], acc_rest * factor[:, None] if REST else acc_rest


@triton.jit
def _load_values(v_ptr, kv_batch_head, k_block, k_blocks, BLOCK_K: tl.constexpr, FIRST: tl.constexpr,
                 CHANNELS: tl.constexpr, D: tl.constexpr, PITCH: tl.constexpr, PV_INT8: tl.constexpr,
                 TMA: tl.constexpr):
    """The values of a block, of the channels from FIRST on: int8 [CHANNELS, BLOCK_K] or float16 [BLOCK_K, CHANNELS]."""
    if PV_INT8:
        return load_channels(source=v_ptr, row=kv_batch_head * D + FIRST, column=k_block * BLOCK_K,
                             pitch=k_blocks * BLOCK_K, ROWS=CHANNELS, COLS=BLOCK_K, LIMIT=D - FIRST, TMA=TMA)
    else:
        return load_tile(source=v_ptr, row=(kv_batch_head * k_blocks + k_block) * BLOCK_K, PITCH=PITCH, ROWS=BLOCK_K,
                         FIRST=FIRST, COLS=CHANNELS, TMA=TMA)


@triton.jit
def _plus_product(acc, p, v, factor, v_scale, v_channel_scale_ptr, by_channel, BLOCK_Q: tl.constexpr,
                  FIRST: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr, PV_INT8: tl.constexpr,
                  FP16_SUMS: tl.constexpr, CARE: tl.constexpr):
    """acc [BLOCK_Q, CHANNELS] plus P·V of values as `_load_values` has them."""
    if PV_INT8:
        product = tl.dot(p, tl.trans(v)).to(tl.float32)
        if CARE:
            channels = FIRST + tl.arange(0, CHANNELS)
            scale = tl.load(v_channel_scale_ptr + channels, mask=channels < tl.where(by_channel, D, 0), other=1.0)
            product *= scale[None, :]
        return tl.fma(product, tl.broadcast_to(factor[:, None], [BLOCK_Q, CHANNELS]), acc)
    elif FP16_SUMS:
        product = tl.dot(p.to(tl.float16), v, out_dtype=tl.float16).to(tl.float32)
        return acc + (product * v_scale if CARE else product)
    else:
        return tl.dot(p.to(tl.float16), v, acc)

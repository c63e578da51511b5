"""Pieces of the attention kernel's loop: masking of scores, the online softmax, and P as an operand of P·V."""
import triton
import triton.language as tl

from ..triton_package import triton_version
from .products import times_keys

# log2 of the unit in which P is packed by PTX: 16 times float16's smallest number, see `to_int8_operand`.
INT8_UNIT = -20
# Triton 3.2 would send P through shared memory for `sums_by_lane`.
SUMS_BY_LANE = tl.constexpr((triton_version() or (3, 3)) >= (3, 3))


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
def frozen_max(q, q_rest, q_scale, k_ptr, k_rest_ptr, k_scale_ptr, q_block, first_block, kv_batch_head, k_blocks,
               BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
               PITCH: tl.constexpr, TMA: tl.constexpr):
    """The maximum [BLOCK_Q] of the scores of a block of queries with the keys at their own places, kept or not, and of
    the block that is listed first, for queries that attend to nothing near, such as text. That of all kept keys is
    hardly ever higher by 2^16."""
    highest = tl.full([BLOCK_Q], -1e30, tl.float32)
    own: tl.constexpr = BLOCK_Q // BLOCK_K if BLOCK_Q > BLOCK_K else 1
    for i in tl.static_range(own + 1):
        block = first_block if i == own else tl.minimum(q_block * BLOCK_Q // BLOCK_K + i, k_blocks - 1)
        products = times_keys(q=q, q_rest=q_rest, k_ptr=k_ptr, k_rest_ptr=k_rest_ptr,
                              row=(kv_batch_head * k_blocks + block) * BLOCK_K, BLOCK_K=BLOCK_K, MAIN=MAIN, REST=REST,
                              PITCH=PITCH, TMA=TMA)
        highest = tl.maximum(highest, tl.max(products, 1).to(tl.float32) * (q_scale * tl.load(k_scale_ptr + block)))
    return highest


@triton.jit
def not_all(rows):
    """Whether one of rows [N] is false."""
    return tl.max((rows == 0).to(tl.int32), 0) > 0


@triton.jit
def sums_by_lane(p, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sums of P [BLOCK_Q, BLOCK_K] by rows as NVIDIA's tensor cores hold it, [BLOCK_Q, 4], each lane's of four for
    itself: adding them up, which takes shuffles, waits until the end."""
    return tl.sum(tl.sum(tl.reshape(p, [BLOCK_Q, BLOCK_K // 8, 4, 2]), 3), 1)


@triton.jit
def rows_below(local_max, highest, limit, BLOCK_Q: tl.constexpr, ROW_GROUP: tl.constexpr):
    """The λ test: bool [BLOCK_Q], the rows of groups whose probabilities in this block are all below 2^-limit of their
    largest so far, and the number of these groups; from the maxima of the rows in this block and so far."""
    below = tl.max(tl.reshape(local_max - highest, [BLOCK_Q // ROW_GROUP, ROW_GROUP]), 1) < -limit
    n_below = tl.sum(below.to(tl.int32), 0)
    return tl.reshape(tl.broadcast_to(below[:, None], [BLOCK_Q // ROW_GROUP, ROW_GROUP]), [BLOCK_Q]), n_below


@triton.jit
def rounding_bytes(block_max):
    """Four bytes for each row of a block, int32 like block_max, by which `to_int8_operand` rounds P up or down: the
    last bits of the row's maximum, mixed. They are others in each row, block, head and sampling step."""
    return block_max.to(tl.int32, bitcast=True) * 0x1E3779B1


@triton.jit
def to_int8_operand(p, row_bytes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEY_GROUP: tl.constexpr,
                    P_UNIT: tl.constexpr):
    """P [BLOCK_Q, BLOCK_K], from 0 to 127 times 2^P_UNIT, as int8, its columns permuted inside each KEY_GROUP as the
    keys of V are stored, and its sums by rows, int32 [BLOCK_Q, 4], each lane's of four for itself: adding them up waits
    until the end. P_UNIT: INT8_UNIT on NVIDIA's GPUs, 0 elsewhere.

    P goes up or down with the probability of its fraction: a byte of row_bytes [BLOCK_Q], as a fraction, is added, and
    the integer below is taken. Rounded to the nearest, small probabilities of a block would all be lost, in every step
    anew, and that changes a picture more than the noise does.
    """
    p = _in_order_of_values(p, BLOCK_Q, BLOCK_K, KEY_GROUP)
    if P_UNIT != 0:
        # The numbers from 0 to 2047 times 2^-24 are float16's smallest, whose bits are the integer: one instruction
        # makes two of them, with four bits of the fraction; one each adds to two, packs four and sums four.
        row_bytes = _beside_quarters(row_bytes, BLOCK_Q, BLOCK_K, KEY_GROUP)
        p0, p1, p2, p3 = _quarters(p, BLOCK_Q, BLOCK_K)
        packed, sums = tl.inline_asm_elementwise("""{
            .reg .b32 low, high, up;
            cvt.rn.f16x2.f32 low, $3, $2;
            cvt.rn.f16x2.f32 high, $5, $4;
            prmt.b32 up, $6, 0, 0x4140;
            mad.lo.u32 low, low, 16, up;
            prmt.b32 up, $6, 0, 0x4342;
            mad.lo.u32 high, high, 16, up;
            prmt.b32 $0, low, high, 0x7531;
            dp4a.u32.u32 $1, $0, 0x01010101, 0;
            }""", "=&r,=r,f,f,f,f,r", [p0, p1, p2, p3, row_bytes], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
        even = tl.join(packed.to(tl.int8), (packed >> 16).to(tl.int8))  # the compiler sees that this is `packed`
        odd = tl.join((packed >> 8).to(tl.int8), (packed >> 24).to(tl.int8))
        return tl.reshape(tl.join(even, odd), [BLOCK_Q, BLOCK_K]), _by_lane(sums, BLOCK_Q, BLOCK_K, KEY_GROUP)
    else:
        up = (row_bytes[:, None] >> (8 * (tl.arange(0, BLOCK_K) % 4))[None, :]) & 255
        rounded = (p + (up.to(tl.float32) + 0.5) / 256).to(tl.int8)  # 127, a little less in float32, stays 127
        sums = tl.sum(tl.reshape(rounded.to(tl.int32), [BLOCK_Q, BLOCK_K // 4, 4]), 2)
        return rounded, _by_lane(sums, BLOCK_Q, BLOCK_K, KEY_GROUP)


@triton.jit
def beside_sums(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEY_GROUP: tl.constexpr):
    """x [BLOCK_Q] as [BLOCK_Q, 4], in the registers that hold the sums of `to_int8_operand`."""
    return _by_lane(_beside_quarters(x, BLOCK_Q, BLOCK_K, KEY_GROUP), BLOCK_Q, BLOCK_K, KEY_GROUP, False)


@triton.jit
def _in_order_of_values(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEY_GROUP: tl.constexpr):
    """x [BLOCK_Q, BLOCK_K] with its columns permuted inside each KEY_GROUP as the keys of V are stored."""
    x = tl.reshape(x, [BLOCK_Q, BLOCK_K // KEY_GROUP, KEY_GROUP // 8, 4, 2])
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [BLOCK_Q, BLOCK_K])


@triton.jit
def _by_lane(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEY_GROUP: tl.constexpr, ADD: tl.constexpr = True):
    """x [BLOCK_Q, BLOCK_K / 4], a number for each four columns in the order of V, as [BLOCK_Q, 4] by the lane that
    holds them: their sums, or under ADD = False one of them, where all are the same."""
    x = tl.reshape(x, [BLOCK_Q, BLOCK_K // KEY_GROUP, 4, KEY_GROUP // 16])
    return tl.sum(tl.sum(x, 3), 1) if ADD else tl.max(tl.max(x, 3), 1)


@triton.jit
def _beside_quarters(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEY_GROUP: tl.constexpr):
    """x [BLOCK_Q] as [BLOCK_Q, BLOCK_K / 4], in the registers that hold each four columns in the order of V."""
    x = _in_order_of_values(tl.broadcast_to(x[:, None], [BLOCK_Q, BLOCK_K]), BLOCK_Q, BLOCK_K, KEY_GROUP)
    first, _, _, _ = _quarters(x, BLOCK_Q, BLOCK_K)
    return first


@triton.jit
def _quarters(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first, second, third and last of each four columns of x [BLOCK_Q, BLOCK_K]."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_Q, BLOCK_K // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3

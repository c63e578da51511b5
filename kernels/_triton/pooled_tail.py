"""The pooled tail: what skipped blocks add to attention, each as one key."""
import triton
import triton.language as tl

from .block_lists import words_a_row
from .products import rescaled
from .softmax import SUMS_BY_LANE, not_all, sums_by_lane
from .tiles import load_pooled

# Beside a sum this large, of P relative to the kept keys, these are nothing in float32.
_MOST_TOTAL = tl.constexpr(2.0 ** 62)
# Terms of a pooled key that none of it is left of: a scale of 0 and, in float16, a weight of -inf.
_NO_TERMS = tl.constexpr(0xFC00)


@triton.jit
def add_pooled_tail(
        acc, acc_rest, total, running_max, q, q_rest, q_scale, pooled_k, pooled_k_rest, pooled_terms_ptr, pooled_v,
        pooled_v_rest, skipped_ptr, map_row, kv_batch_head, k_blocks,
        BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr,
        TAIL_STAGES: tl.constexpr, P_SHIFT: tl.constexpr, TMA: tl.constexpr):
    """Add the skipped blocks of a row of the map to acc [BLOCK_Q, MAIN], acc_rest [BLOCK_Q, REST] and total [BLOCK_Q]:
    each is one key, with the means of its keys and values. Returns them with the new running maximum [BLOCK_Q].

    P is relative to the log-sum-exp of the kept keys and has the range of float32, so that one pass does, without a
    maximum. Rows whose sum leaves that range, or that kept no key, which is rare, are the tail's alone, and take it
    again relative to its own maximum.
    """
    # What was kept becomes one key of weight 1. Without a step between the loops ptxas lets all their products wait.
    empty = total == 0.0
    running_max = tl.where(empty, -1e30, running_max + tl.log2(total))
    acc, acc_rest = rescaled(acc=acc, acc_rest=acc_rest, factor=tl.where(empty, 0.0, 1.0 / total), REST=REST)
    total = tl.where(empty, 0.0, total / total)  # of NaN itself
    acc, acc_rest, total = _add(
        acc, acc_rest, total, running_max, q, q_rest, q_scale, pooled_k, pooled_k_rest, pooled_terms_ptr, pooled_v,
        pooled_v_rest, skipped_ptr, map_row, kv_batch_head, k_blocks, BLOCK_Q, MAIN, REST, PITCH, TAIL_TILE,
        TAIL_STAGES, P_SHIFT, TMA)
    alone = total > _MOST_TOTAL
    if not_all(alone == 0):
        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        for start in range(0, k_blocks, TAIL_TILE):
            terms = _terms(pooled_terms_ptr, skipped_ptr, map_row, kv_batch_head, k_blocks, start, TAIL_TILE)
            scores = _scores(q, q_rest, q_scale, pooled_k, pooled_k_rest, terms, kv_batch_head, k_blocks, start, MAIN,
                             REST, PITCH, TAIL_TILE, TMA)
            highest = tl.maximum(highest, tl.max(scores, 1))
        running_max = tl.where(alone, highest, running_max)
        acc = tl.where(alone[:, None], 0.0, acc)
        if REST:
            acc_rest = tl.where(alone[:, None], 0.0, acc_rest)
        total = tl.where(alone, 0.0, total)
        acc, acc_rest, total = _add(
            acc, acc_rest, total, tl.where(alone, highest, float("inf")), q, q_rest, q_scale, pooled_k, pooled_k_rest,
            pooled_terms_ptr, pooled_v, pooled_v_rest, skipped_ptr, map_row, kv_batch_head, k_blocks, BLOCK_Q, MAIN,
            REST, PITCH, TAIL_TILE, TAIL_STAGES, P_SHIFT, TMA)
    return acc, acc_rest, total, running_max


@triton.jit
def _add(acc, acc_rest, total, relative_to, q, q_rest, q_scale, pooled_k, pooled_k_rest, pooled_terms_ptr, pooled_v,
         pooled_v_rest, skipped_ptr, map_row, kv_batch_head, k_blocks, BLOCK_Q: tl.constexpr, MAIN: tl.constexpr,
         REST: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr, TAIL_STAGES: tl.constexpr,
         P_SHIFT: tl.constexpr, TMA: tl.constexpr):
    """acc, acc_rest and total plus the tail, with P relative to relative_to [BLOCK_Q].

    All tiles are taken, without a test for skipped blocks, so that loads run ahead.
    """
    lane_total = tl.zeros([BLOCK_Q, 4], tl.float32)
    last = (k_blocks - 1) // TAIL_TILE * TAIL_TILE
    # Terms come one step ahead: loaded where they are used, they would wait for shared memory at a barrier.
    next_terms = _terms(pooled_terms_ptr, skipped_ptr, map_row, kv_batch_head, k_blocks, 0, TAIL_TILE)
    for start in tl.range(0, k_blocks, TAIL_TILE, num_stages=TAIL_STAGES):
        terms = next_terms
        next_terms = _terms(pooled_terms_ptr, skipped_ptr, map_row, kv_batch_head, k_blocks,
                            tl.minimum(start + TAIL_TILE, last), TAIL_TILE)
        scores = _scores(q, q_rest, q_scale, pooled_k, pooled_k_rest, terms, kv_batch_head, k_blocks, start, MAIN, REST,
                         PITCH, TAIL_TILE, TMA)
        p = tl.exp2(scores - (relative_to - P_SHIFT)[:, None])
        if SUMS_BY_LANE:
            lane_total += sums_by_lane(p, BLOCK_Q, TAIL_TILE)
        else:
            total += tl.sum(p, 1)
        v = load_pooled(source=pooled_v, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, PITCH=PITCH,
                        ROWS=TAIL_TILE, FIRST=0, COLS=MAIN, TMA=TMA)  # [TAIL_TILE, MAIN] bfloat16
        if REST:
            v_rest = load_pooled(source=pooled_v_rest, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start,
                                 PITCH=PITCH, ROWS=TAIL_TILE, FIRST=MAIN, COLS=REST, TMA=TMA)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc)
        if REST:
            acc_rest = tl.dot(p, v_rest, acc_rest)
    return acc, acc_rest, total + tl.sum(lane_total, 1)


@triton.jit
def _scores(
        q, q_rest, q_scale, pooled_k, pooled_k_rest, terms, kv_batch_head, k_blocks, start,
        MAIN: tl.constexpr, REST: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr, TMA: tl.constexpr):
    """Scores of the pooled keys from block `start` on, [BLOCK_Q, TAIL_TILE], log2, given their terms."""
    k = load_pooled(source=pooled_k, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, PITCH=PITCH,
                    ROWS=TAIL_TILE, FIRST=0, COLS=MAIN, TMA=TMA)  # [TAIL_TILE, MAIN] int8
    if REST:
        k_rest = load_pooled(source=pooled_k_rest, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start,
                             PITCH=PITCH, ROWS=TAIL_TILE, FIRST=MAIN, COLS=REST, TMA=TMA)
    products = tl.dot(q, tl.trans(k))
    if REST:
        products = tl.dot(q_rest, tl.trans(k_rest), products, out_dtype=tl.int32)
    scale = terms.to(tl.float32, bitcast=True)
    weight = terms.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return products.to(tl.float32) * scale[None, :] * q_scale[:, None] + weight[None, :]


@triton.jit
def _terms(pooled_terms_ptr, skipped_ptr, map_row, kv_batch_head, k_blocks, start, TAIL_TILE: tl.constexpr):
    """`pooled_terms` of the pooled keys from block `start` on, [TAIL_TILE], as of none where blocks are not skipped."""
    words = words_a_row(k_blocks)
    place = tl.arange(0, TAIL_TILE)
    bits = tl.load(skipped_ptr + map_row * words + start // 32)
    if TAIL_TILE == 64:
        bits = tl.where(place < 32, bits, tl.load(skipped_ptr + map_row * words + start // 32 + 1))
    # So that a thread, which holds two columns of every eight, shifts twice and tests constant bits.
    skipped = ((bits >> (place % 8)) & (1 << (place // 8 * 8 % 32))) != 0
    terms = tl.load(pooled_terms_ptr + kv_batch_head.to(tl.int64) * (words * 32) + start + place)
    return tl.where(skipped, terms, _NO_TERMS)

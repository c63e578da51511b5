"""The pooled tail: what skipped blocks add to attention, each as one key."""
import triton
import triton.language as tl

from .products import rescaled
from .softmax import online_softmax_update
from .tiles import load_pooled


@triton.jit
def add_pooled_tail(
        acc, acc_rest, total, running_max, q, q_rest, q_scale, pooled_k, pooled_k_rest, pooled_k_scale_ptr, pooled_v,
        pooled_v_rest, tail_weight_ptr, map_row, kv_batch_head, k_blocks,
        BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr,
        PV_INT8: tl.constexpr, P_SHIFT: tl.constexpr, TMA: tl.constexpr):
    """Add the skipped blocks of a row of the map to acc [BLOCK_Q, MAIN], acc_rest [BLOCK_Q, REST] and total [BLOCK_Q]:
    each is one key, with the means of its keys and values. Returns them with the new running maximum [BLOCK_Q].

    All tiles are taken, without a test for skipped blocks, so that loads run ahead. A sum is rescaled beside a product
    in INT8 and before all of them in 16 bits: else ptxas runs short of registers, for the loops over blocks too, and
    lets every product of the kernel wait for the one before.
    """
    before = running_max
    for SUM in tl.static_range(1 if PV_INT8 else 0, 2):
        if SUM and not PV_INT8:
            decay = tl.exp2(before - running_max)
            acc, acc_rest = rescaled(acc=acc, acc_rest=acc_rest, factor=decay, REST=REST)
            total *= decay
        for start in range(0, k_blocks, TAIL_TILE):
            scores = tail_scores(
                q=q, q_rest=q_rest, q_scale=q_scale, pooled_k=pooled_k, pooled_k_rest=pooled_k_rest,
                pooled_k_scale_ptr=pooled_k_scale_ptr, tail_weight_ptr=tail_weight_ptr, map_row=map_row,
                kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, MAIN=MAIN, REST=REST, PITCH=PITCH,
                TAIL_TILE=TAIL_TILE, TMA=TMA)
            if not SUM:
                running_max = tl.maximum(running_max, tl.max(scores, 1))
            else:
                decay = running_max  # of INT8 alone
                if PV_INT8:
                    p, decay, total, running_max, _ = online_softmax_update(
                        total=total, running_max=running_max, scores=scores, scores_max=tl.max(scores, 1),
                        scale=tl.full([BLOCK_Q], 1.0, tl.float32), P_SHIFT=P_SHIFT)
                else:
                    p = tl.exp2(scores - running_max[:, None])
                    total += tl.sum(p, 1)
                v = load_pooled(source=pooled_v, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start,
                                PITCH=PITCH, ROWS=TAIL_TILE, FIRST=0, COLS=MAIN, TMA=TMA)  # [TAIL_TILE, MAIN] float16
                if REST:
                    v_rest = load_pooled(source=pooled_v_rest, kv_batch_head=kv_batch_head, k_blocks=k_blocks,
                                         start=start, PITCH=PITCH, ROWS=TAIL_TILE, FIRST=MAIN, COLS=REST, TMA=TMA)
                acc = _plus_product(acc=acc, decay=decay, p=p, v=v, BLOCK_Q=BLOCK_Q, CHANNELS=MAIN, PV_INT8=PV_INT8)
                if REST:
                    acc_rest = _plus_product(acc=acc_rest, decay=decay, p=p, v=v_rest, BLOCK_Q=BLOCK_Q, CHANNELS=REST,
                                             PV_INT8=PV_INT8)
    return acc, acc_rest, total, running_max


@triton.jit
def _plus_product(acc, decay, p, v, BLOCK_Q: tl.constexpr, CHANNELS: tl.constexpr, PV_INT8: tl.constexpr):
    """acc [BLOCK_Q, CHANNELS], in INT8 times decay [BLOCK_Q], plus P·V."""
    if PV_INT8:
        return tl.fma(acc, tl.broadcast_to(decay[:, None], [BLOCK_Q, CHANNELS]), tl.dot(p.to(tl.float16), v))
    else:
        return tl.dot(p.to(tl.float16), v, acc)


@triton.jit
def tail_scores(
        q, q_rest, q_scale, pooled_k, pooled_k_rest, pooled_k_scale_ptr, tail_weight_ptr, map_row, kv_batch_head,
        k_blocks, start, MAIN: tl.constexpr, REST: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr,
        TMA: tl.constexpr):
    """Scores of the pooled keys from block `start` on, [BLOCK_Q, TAIL_TILE], log2; -inf for blocks that are not
    skipped."""
    k_block = start + tl.arange(0, TAIL_TILE)  # [TAIL_TILE]
    inside = k_block < k_blocks
    k = load_pooled(source=pooled_k, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, PITCH=PITCH,
                    ROWS=TAIL_TILE, FIRST=0, COLS=MAIN, TMA=TMA)  # [TAIL_TILE, MAIN] int8
    if REST:
        k_rest = load_pooled(source=pooled_k_rest, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start,
                             PITCH=PITCH, ROWS=TAIL_TILE, FIRST=MAIN, COLS=REST, TMA=TMA)
    products = tl.dot(q, tl.trans(k))
    if REST:
        products = tl.dot(q_rest, tl.trans(k_rest), products, out_dtype=tl.int32)
    k_scale = tl.load(pooled_k_scale_ptr + kv_batch_head.to(tl.int64) * k_blocks + k_block, mask=inside,
                      other=0.0).to(tl.float32)
    weight = tl.load(tail_weight_ptr + map_row * k_blocks + k_block, mask=inside, other=float("-inf")).to(tl.float32)
    return products.to(tl.float32) * k_scale[None, :] * q_scale[:, None] + weight[None, :]

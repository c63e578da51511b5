"""The pooled tail: what skipped blocks add to attention, each as one key."""
import triton
import triton.language as tl

from .softmax import online_softmax_update
from .tiles import load_pooled


@triton.jit
def add_pooled_tail(
        acc, total, running_max, q, q_scale, pooled_k, pooled_k_scale_ptr, pooled_v, tail_weight_ptr, map_row,
        kv_batch_head, k_blocks, end,
        BLOCK_Q: tl.constexpr, PADDED_D: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr,
        PV_INT8: tl.constexpr, FROZEN: tl.constexpr, P_SHIFT: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr):
    """Add the skipped blocks before `end` of a row of the map to acc [BLOCK_Q, PADDED_D] and total [BLOCK_Q]: each is
    one key, with the means of its keys and values. Returns both with the new running maximum [BLOCK_Q], which stays
    what it is under FROZEN: P then may leave float16, as in the loop over blocks. STAGES: of the pipeline, None for
    that of the launch.

    All tiles are taken, without a test for skipped blocks, so that loads run ahead. A sum is rescaled beside a product
    in INT8 and before all of them in 16 bits: else ptxas runs short of registers, for the loops over blocks too, and
    lets every product of the kernel wait for the one before.
    """
    before = running_max
    for SUM in tl.static_range(1 if PV_INT8 or FROZEN else 0, 2):
        if SUM and not (PV_INT8 or FROZEN):
            decay = tl.exp2(before - running_max)
            acc *= decay[:, None]
            total *= decay
        for start in tl.range(0, end, TAIL_TILE, num_stages=STAGES):
            scores = tail_scores(
                q=q, q_scale=q_scale, pooled_k=pooled_k, pooled_k_scale_ptr=pooled_k_scale_ptr,
                tail_weight_ptr=tail_weight_ptr, map_row=map_row, kv_batch_head=kv_batch_head, k_blocks=k_blocks,
                start=start, PADDED_D=PADDED_D, PITCH=PITCH, TAIL_TILE=TAIL_TILE, TMA=TMA)
            if not SUM:
                running_max = tl.maximum(running_max, tl.max(scores, 1))
            else:
                if PV_INT8:
                    p, decay, total, running_max, _ = online_softmax_update(
                        total=total, running_max=running_max, scores=scores, scores_max=tl.max(scores, 1),
                        scale=tl.full([BLOCK_Q], 1.0, tl.float32), P_SHIFT=P_SHIFT)
                else:
                    p = tl.exp2(scores - running_max[:, None])
                    total += tl.sum(p, 1)
                v = load_pooled(source=pooled_v, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start,
                                PITCH=PITCH, ROWS=TAIL_TILE, COLS=PADDED_D, TMA=TMA)  # [TAIL_TILE, PADDED_D] float16
                if PV_INT8:
                    decay = tl.broadcast_to(decay[:, None], [BLOCK_Q, PADDED_D])
                    acc = tl.fma(acc, decay, tl.dot(p.to(tl.float16), v))
                else:
                    acc = tl.dot(p.to(tl.float16), v, acc)
    return acc, total, running_max


@triton.jit
def tail_scores(
        q, q_scale, pooled_k, pooled_k_scale_ptr, tail_weight_ptr, map_row, kv_batch_head, k_blocks, start,
        PADDED_D: tl.constexpr, PITCH: tl.constexpr, TAIL_TILE: tl.constexpr, TMA: tl.constexpr):
    """Scores of the pooled keys from block `start` on, [BLOCK_Q, TAIL_TILE], log2; -inf for blocks that are not
    skipped."""
    k_block = start + tl.arange(0, TAIL_TILE)  # [TAIL_TILE]
    inside = k_block < k_blocks
    k = load_pooled(source=pooled_k, kv_batch_head=kv_batch_head, k_blocks=k_blocks, start=start, PITCH=PITCH,
                    ROWS=TAIL_TILE, COLS=PADDED_D, TMA=TMA)  # [TAIL_TILE, PADDED_D] int8
    k_scale = tl.load(pooled_k_scale_ptr + kv_batch_head.to(tl.int64) * k_blocks + k_block, mask=inside,
                      other=0.0).to(tl.float32)
    weight = tl.load(tail_weight_ptr + map_row * k_blocks + k_block, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.dot(q, tl.trans(k)).to(tl.float32) * k_scale[None, :] * q_scale[:, None] + weight[None, :]

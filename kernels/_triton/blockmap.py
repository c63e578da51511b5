"""The block map: predicted scores, then TopCdf or TopK row by row without a sort, in one launch."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from ..formats import LOG2E
from ..types import BlockShape
from .block_lists import (
    BlockLists,
    allocate_lists,
    cannot_skip,
    causal_limits,
    needs_care,
    skip_bits,
    store_counts,
    words_a_row,
)
from .launch import launch
from .prepared import PreparedKeys, PreparedQueries, PreparedValues
from .primitives import kept_by_rule, padded_dim, threshold_of
from .threshold import PIECES, UNJUDGED, block_tile, by_row, find_threshold, load_scores, reach, values_of

_ROWS = 16  # query blocks of a program, the least that tensor cores multiply
_RESIDENT = 512  # scores of a row that stay in registers while its threshold is sought, at most
_SEARCHED = 256  # scores of a row beyond these that a step of the search takes together
_CHUNK = 128  # scores of a row that a program looks at together elsewhere


@triton.jit
def predict_scores(
        # inputs
        q_mean, k_mean_ptr, k_similarity_ptr, k_count_ptr, k_mean_bias_ptr, similarity_threshold, factor,
        # outputs
        scores_ptr,
        # sizes
        offset, kv_offset, diagonal, end, last, k_blocks,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, TILE: tl.constexpr):
    """Scores of rows of the map from the means of their blocks, in log2 units; `UNJUDGED` for blocks that a rule keeps,
    -inf for those without keys.

    q_mean [ROWS, PADDED_D]; offset, diagonal, end [ROWS]; k_similarity_ptr and k_count_ptr point at the head.
    """
    channels = tl.arange(0, PADDED_D)
    for start in range(0, last, TILE):
        k_block = start + tl.arange(0, TILE)  # [TILE]
        inside = k_block < k_blocks
        k_mean = tl.load(k_mean_ptr + (kv_offset + k_block)[:, None] * D + channels,
                         mask=inside[:, None] & (channels < D), other=0.0)  # [TILE, PADDED_D]
        # In TF32 where the hardware has it: a thousandth of a score predicts nothing.
        scores = tl.dot(q_mean, tl.trans(k_mean)) * factor  # [ROWS, TILE]
        similarity = tl.load(k_similarity_ptr + k_block, mask=inside, other=0.0)
        judged = kept_by_rule(similarity=similarity, threshold=similarity_threshold) == 0
        if k_mean_bias_ptr is not None:
            bias = tl.load(k_mean_bias_ptr + kv_offset + k_block, mask=inside, other=0.0)
            scores += bias[None, :]
            judged = judged & (bias == bias)
        scores = tl.where(judged[None, :] & (k_block[None, :] < diagonal[:, None]), scores, UNJUDGED)
        visible = tl.load(k_count_ptr + k_block, mask=inside, other=0) > 0
        scores = tl.where(visible[None, :], scores, float("-inf"))
        tl.store(scores_ptr + offset[:, None] + k_block[None, :], scores, mask=k_block[None, :] < end[:, None])
    tl.debug_barrier()


@triton.jit
def write_list(
        # inputs
        scores_ptr, k_count_ptr, k_biased_ptr, v_block_scale_ptr, v_plain_scale, threshold, highest, keep_all,
        # outputs
        indices_ptr, skipped_ptr,
        # sizes
        map_row, exists, offset, kv_offset, diagonal, end, last, k_blocks,
        # constants
        TOPK: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Write the blocks of rows of the map that a rule or their score keeps, and the bits of the others.

    Returns (n_plain, n_kept), [ROWS]: how many leading entries need no care, and how many there are. `indices_ptr` may
    be the memory of `scores_ptr`: an entry is never written beyond the chunk whose scores have been read.
    """
    n_kept = tl.zeros([ROWS], tl.int32)
    n_plain = tl.full([ROWS], k_blocks, tl.int32)
    for start in range(0, last, CHUNK):
        k_block = block_tile(start, CHUNK)
        inside = k_block < k_blocks
        scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=k_block, end=end)
        visible = scores > float("-inf")
        values = values_of(scores=scores, highest=by_row(highest), TOPK=TOPK)
        kept = by_row(keep_all) | (scores <= UNJUDGED) | reach(values=values, threshold=threshold)
        count = tl.load(k_count_ptr + k_block, mask=inside, other=0)
        v_block_scale = None
        if v_block_scale_ptr is not None:
            v_block_scale = tl.load(v_block_scale_ptr + kv_offset + k_block, mask=inside, other=1.0)
            kept = kept | cannot_skip(v_block_scale)
        special = needs_care(k_block=k_block, count=count, diagonal=by_row(diagonal), v_block_scale=v_block_scale,
                             v_plain_scale=v_plain_scale, biased_ptr=k_biased_ptr, kv_offset=kv_offset, inside=inside,
                             BLOCK_K=BLOCK_K)
        kept = kept & visible
        taken = kept.to(tl.int32)
        n_piece = tl.sum(taken, 2)
        place = tl.cumsum(taken, 2) - 1 + (by_row(n_kept) + (tl.cumsum(n_piece, PIECES) - n_piece)[:, :, None])
        n_plain = tl.minimum(n_plain, tl.min(tl.min(tl.where(kept & special, place, k_blocks), PIECES), 1))
        if skipped_ptr is not None:
            store_skipped(skipped_ptr=skipped_ptr, bits=skip_bits(visible=visible, kept=kept, AXIS=2), map_row=map_row,
                          exists=exists, start=start, k_blocks=k_blocks, CHUNK=CHUNK)
        tl.debug_barrier()  # every score of this chunk has been read before its memory takes the list
        tl.store(indices_ptr + by_row(offset) + place, tl.broadcast_to(k_block, place.shape), mask=kept)
        n_kept += tl.sum(n_piece, PIECES)
    return n_plain, n_kept


@triton.jit
def store_skipped(skipped_ptr, bits, map_row, exists, start, k_blocks, CHUNK: tl.constexpr):
    """Words of BlockLists.skipped for the CHUNK blocks from `start` on, one a piece, of rows that exist."""
    words = words_a_row(k_blocks)
    word, row = tl.arange(0, CHUNK // 32), map_row * words
    if PIECES == 1:
        word, row, exists = word[None, :], row[:, None], exists[:, None]
    else:
        word, row, exists = word[:, None], row[None, :], exists[None, :]
    word += start // 32
    tl.store(skipped_ptr + row + word, bits, mask=exists & (word < words))


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "q_tokens", "heads", "group"])
def _select_kernel(
        # inputs
        q_mean_ptr, k_mean_ptr, q_similarity_ptr, k_similarity_ptr, k_count_ptr, k_mean_bias_ptr, k_biased_ptr,
        v_block_scale_ptr, v_plain_scale, per_head_ptr, amount, similarity_threshold, factor,
        # outputs
        scores_ptr, indices_ptr, counts_ptr, skipped_ptr,
        # sizes
        q_blocks, k_blocks, q_tokens, heads, group,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, TOPK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr, ROWS: tl.constexpr, RESIDENT: tl.constexpr, SEARCHED: tl.constexpr,
        CHUNK: tl.constexpr, PRODUCT: tl.constexpr):
    """ROWS rows of the map a program.

    scores = q_mean · k_meanᵀ · factor + k_mean_bias. Under cdf a row keeps its largest softmax(scores) until their sum
    reaches `amount`, under TOPK the share `amount` of its visible blocks; equal scores are kept together. On top come
    blocks with a similarity below `similarity_threshold` (cdf alone), `FORCED` ones, ones that the causal diagonal cuts
    and ones with values that are not finite. Source: SpargeAttn (arXiv 2502.18137), section 3.3.

    Inputs:
    q_mean_ptr, k_mean_ptr: float32 (B, H, q_blocks, D) and (B, Hkv, k_blocks, D), in the units of q and k.
    q_similarity_ptr, k_similarity_ptr: float32 (B, H, q_blocks) and (B, Hkv, k_blocks), `FORCED` and NaN among them.
    k_count_ptr: int32 (B, Hkv, k_blocks), keys that exist.
    k_mean_bias_ptr: float32 (B, Hkv, k_blocks), log2; k_biased_ptr: int8 of that shape, 0 or 1; or None.
    v_block_scale_ptr: float32 (B, Hkv, k_blocks), or None; v_plain_scale: see `PreparedValues`.
    per_head_ptr: float32 (3, H), amount, similarity and pv threshold of each head, in place of the plain numbers.
    factor: softmax scale · log2 e.
    Outputs:
    scores_ptr: float32 (B, H, q_blocks, k_blocks), in the memory of the indices: a row's list replaces its scores.
    indices_ptr, counts_ptr, skipped_ptr: see `BlockLists`.
    """
    programs = tl.cdiv(q_blocks, ROWS)  # of a head
    batch_head = tl.program_id(0) // programs
    q_block = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)  # [ROWS]
    exists = q_block < q_blocks
    head = batch_head % heads
    kv_offset = (batch_head // heads * (heads // group) + head // group).to(tl.int64) * k_blocks
    map_row = batch_head.to(tl.int64) * q_blocks + q_block  # [ROWS]
    offset = map_row * k_blocks
    channels = tl.arange(0, PADDED_D)
    k_similarity_ptr += kv_offset
    k_count_ptr += kv_offset
    amount = threshold_of(per_head_ptr=per_head_ptr, ROW=0, head=head, heads=heads, value=amount)
    # Under topk the share of blocks is fixed: no similarity falls below -1, but FORCED ones and NaN.
    similarity_threshold = -1.0 if TOPK else threshold_of(
        per_head_ptr=per_head_ptr, ROW=1, head=head, heads=heads, value=similarity_threshold)
    # A block that holds NaN or infinity has a similarity of NaN and is kept too: the rows that meet it become NaN.
    q_similarity = tl.load(q_similarity_ptr + map_row, mask=exists, other=0.0)
    keep_all = exists & kept_by_rule(similarity=q_similarity, threshold=similarity_threshold)

    end = tl.where(exists, k_blocks, 0)
    diagonal = tl.full([ROWS], k_blocks, tl.int32)
    if CAUSAL:
        diagonal, end = causal_limits(q_block=q_block, end=end, q_tokens=q_tokens, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K)
    last = tl.max(end, 0)

    q_mean = tl.load(q_mean_ptr + map_row[:, None] * D + channels,
                     mask=(exists & (keep_all == 0))[:, None] & (channels < D), other=0.0)  # [ROWS, PADDED_D]
    predict_scores(
        q_mean=q_mean, k_mean_ptr=k_mean_ptr, k_similarity_ptr=k_similarity_ptr, k_count_ptr=k_count_ptr,
        k_mean_bias_ptr=k_mean_bias_ptr, similarity_threshold=similarity_threshold, factor=factor,
        scores_ptr=scores_ptr,
        offset=offset, kv_offset=kv_offset, diagonal=diagonal, end=end, last=last, k_blocks=k_blocks,
        D=D, PADDED_D=PADDED_D, TILE=PRODUCT)
    threshold, highest, n_visible = find_threshold(
        scores_ptr=scores_ptr, offset=offset, end=end, last=last, amount=amount, keep_all=keep_all,
        TOPK=TOPK, ROWS=ROWS, RESIDENT=RESIDENT, CHUNK=SEARCHED)
    n_plain, n_kept = write_list(
        scores_ptr=scores_ptr, k_count_ptr=k_count_ptr, k_biased_ptr=k_biased_ptr,
        v_block_scale_ptr=v_block_scale_ptr, v_plain_scale=v_plain_scale, threshold=threshold, highest=highest,
        keep_all=keep_all, indices_ptr=indices_ptr, skipped_ptr=skipped_ptr,
        map_row=map_row, exists=exists, offset=offset, kv_offset=kv_offset, diagonal=diagonal, end=end, last=last,
        k_blocks=k_blocks,
        TOPK=TOPK, BLOCK_K=BLOCK_K, ROWS=ROWS, CHUNK=CHUNK)
    if CAUSAL and skipped_ptr is not None:  # nothing is skipped beyond the diagonal
        for start in range(tl.cdiv(last, CHUNK) * CHUNK, k_blocks, CHUNK):
            store_skipped(skipped_ptr=skipped_ptr, bits=0, map_row=map_row, exists=exists, start=start,
                          k_blocks=k_blocks, CHUNK=CHUNK)
    store_counts(counts_ptr=counts_ptr, map_row=map_row, n_plain=n_plain, n_kept=n_kept, n_visible=n_visible,
                 exists=exists)


def select_blocks(queries: PreparedQueries, keys: PreparedKeys, values: PreparedValues | None, *, scale: float,
                  per_head: Tensor | None, thresholds: list[float], selection: str, causal: bool, q_tokens: int,
                  block: BlockShape, pooled: bool, registers: int | None = None) -> BlockLists:
    """The lists of kept blocks of every query block of every head.

    scale: of the softmax. per_head: float32 (3, H), or None, where `thresholds` holds the same three as numbers.
    selection: "cdf" or "topk". pooled: whether the skipped blocks stand in a tail.
    registers: the most of a thread, None for the compiler's choice.
    """
    batch, heads, q_blocks, dim = queries.mean.shape
    kv_heads, k_blocks = keys.similarity.shape[1:]
    padded, device = padded_dim(dim), queries.mean.device
    lists = allocate_lists(device, (batch, heads, q_blocks, k_blocks), pooled)
    launch(
        _select_kernel, (batch * heads * -(-q_blocks // _ROWS),), device,
        inputs=dict(q_mean_ptr=queries.mean, k_mean_ptr=keys.mean, q_similarity_ptr=queries.similarity,
                    k_similarity_ptr=keys.similarity, k_count_ptr=keys.count, k_mean_bias_ptr=keys.mean_bias,
                    k_biased_ptr=keys.biased, v_block_scale_ptr=values and values.block_scale,
                    v_plain_scale=values.plain_scale if values else 1.0, per_head_ptr=per_head,
                    amount=thresholds[0], similarity_threshold=thresholds[1], factor=scale * LOG2E),
        outputs=dict(scores_ptr=lists.indices.view(float32), indices_ptr=lists.indices, counts_ptr=lists.counts,
                     skipped_ptr=lists.skipped),
        sizes=dict(q_blocks=q_blocks, k_blocks=k_blocks, q_tokens=q_tokens, heads=heads, group=heads // kv_heads),
        constants=dict(D=dim, PADDED_D=padded, TOPK=selection == "topk", CAUSAL=causal, BLOCK_Q=block.q,
                       BLOCK_K=block.k, ROWS=_ROWS, RESIDENT=_RESIDENT, SEARCHED=_SEARCHED,
                       CHUNK=_CHUNK, PRODUCT=min(64, 8192 // padded, _CHUNK)),
        options=dict(num_warps=8, num_stages=2) | ({} if registers is None else dict(maxnreg=registers)))
    return lists

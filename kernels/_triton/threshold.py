"""The threshold of a row of the map: TopCdf or TopK by bisection of the scores' bits, without a sort."""
import triton
import triton.language as tl

# Stored in place of the score of a block that a rule keeps; -inf stands where nothing can be attended.
UNJUDGED = tl.constexpr(-3e38)


# Scores are looked at in tiles [ROWS, pieces, 32]: Triton then gives whole rows to a warp, so that sums along them need
# no barrier between warps.

@triton.jit
def block_tile(start, COUNT: tl.constexpr):
    """`COUNT` blocks of K from `start` on, [1, COUNT // 32, 32]."""
    return (start + tl.arange(0, COUNT // 32)[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]


@triton.jit
def by_row(x):
    """Values of rows [ROWS] beside a tile, [ROWS, 1, 1]."""
    return x[:, None, None]


@triton.jit
def sum_row(x):
    """[ROWS, pieces, 32] → [ROWS]."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def load_scores(scores_ptr, offset, k_block, end):
    """Scores of the blocks k_block [1, pieces, 32] of rows that start at `offset` [ROWS]; -inf beyond their `end`."""
    return tl.load(scores_ptr + by_row(offset) + k_block, mask=k_block < by_row(end), other=float("-inf"))


@triton.jit
def ranks_of(scores, highest, TOPK: tl.constexpr):
    """Integers in the order of the scores: the bits of the scores, or under cdf of their exponentials."""
    if TOPK:
        bits = scores.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    else:
        return tl.exp2(scores - highest).to(tl.int32, bitcast=True)


@triton.jit
def mass_from(ranks, threshold, TOPK: tl.constexpr):
    """What the blocks whose rank reaches the threshold of their row add up to, in probability or in blocks, and their
    number; both [ROWS]."""
    over = ranks >= by_row(threshold)
    count = sum_row(over.to(tl.int32))
    if TOPK:
        return count.to(tl.float32), count
    else:
        return sum_row(tl.where(over, ranks.to(tl.float32, bitcast=True), 0.0)), count


@triton.jit
def range_of(scores):
    """Number of visible blocks of each row, number of judged ones, and the largest and smallest of their scores; all
    [ROWS]."""
    judged = scores > UNJUDGED
    low = tl.where(judged, scores, float("inf"))
    return (sum_row((scores > float("-inf")).to(tl.int32)), sum_row(judged.to(tl.int32)),
            tl.max(tl.max(scores, 1), 1), tl.min(tl.min(low, 1), 1))


@triton.jit
def find_threshold(scores_ptr, offset, end, last, amount, keep_all, TOPK: tl.constexpr, ROWS: tl.constexpr,
                   RESIDENT: tl.constexpr, CHUNK: tl.constexpr):
    """(threshold, highest, n_visible) of rows of the map, [ROWS]: the largest rank whose blocks reach the target, the
    largest judged score, which `ranks_of` needs, and the number of blocks that dense attention would visit.

    The target is a share `amount` of the probability, or under TOPK of the visible blocks; keep_all [ROWS] marks rows
    without one. The search is a bisection of ranks: `low` always reaches the target, `above` never does. A row is
    settled when at most one block lies between them, or none can. The first RESIDENT scores stay in registers.
    """
    resident = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(0, RESIDENT), end=end)
    n_visible, n_judged, highest, lowest = range_of(resident)
    for start in range(RESIDENT, last, CHUNK):
        scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(start, CHUNK), end=end)
        seen, judged, higher, lower = range_of(scores)
        n_visible, n_judged = n_visible + seen, n_judged + judged
        highest, lowest = tl.maximum(highest, higher), tl.minimum(lowest, lower)
    highest = tl.where(n_judged > 0, highest, 0.0)

    searched = (n_judged > 0) & (tl.where(keep_all, 1.0, amount) < 1.0)
    resident = ranks_of(scores=resident, highest=by_row(highest), TOPK=TOPK)
    if TOPK:
        target = tl.minimum(tl.maximum(tl.ceil(amount * n_visible - 1e-3), 1.0), n_judged.to(tl.float32))
    else:
        target = sum_row(resident.to(tl.float32, bitcast=True))
        for start in range(RESIDENT, last, CHUNK):
            scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(start, CHUNK), end=end)
            target += sum_row(tl.exp2(scores - by_row(highest)))
        target = target * amount

    low = tl.where(searched, ranks_of(scores=lowest, highest=highest, TOPK=TOPK), 0)
    above = tl.where(searched, ranks_of(scores=highest, highest=highest, TOPK=TOPK) + 1, 0)
    n_low = n_judged
    n_above = tl.zeros([ROWS], tl.int32)
    undecided = tl.max(tl.where(above > low + 1, n_low - n_above, 0), 0)
    while undecided > 1:
        middle = (low & above) + ((low ^ above) >> 1)  # the mean, without overflow
        reached, n_middle = mass_from(ranks=resident, threshold=middle, TOPK=TOPK)
        for start in range(RESIDENT, last, CHUNK):
            scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(start, CHUNK), end=end)
            ranks = ranks_of(scores=scores, highest=by_row(highest), TOPK=TOPK)
            more, n_more = mass_from(ranks=ranks, threshold=middle, TOPK=TOPK)
            reached += more
            n_middle += n_more
        enough = reached >= target
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        above = tl.where(enough, above, middle)
        n_above = tl.where(enough, n_above, n_middle)
        undecided = tl.max(tl.where(above > low + 1, n_low - n_above, 0), 0)
    return tl.where(searched, low, -2147483648), highest, n_visible

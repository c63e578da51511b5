"""The threshold of a row of the map: TopCdf or TopK without a sort, by a search that narrows a range."""
import triton
import triton.language as tl

from ..triton_package import triton_version

# Stored in place of the score of a block that a rule keeps; -inf stands where nothing can be attended.
UNJUDGED = tl.constexpr(-3e38)


# Scores are looked at in tiles of rows by pieces of 32 blocks. Triton gives the last dimension of a tile to the lanes
# of a warp, another to the warps, and the third to the registers of a thread. Which goes to the warps has changed with
# 3.7. It has to be the rows, so that sums along them need no barrier.
PIECES = tl.constexpr(1 if (triton_version() or (3, 7)) < (3, 7) else 0)  # [rows, pieces, 32], [pieces, rows, 32]

@triton.jit
def block_tile(start, COUNT: tl.constexpr):
    """`COUNT` blocks of K from `start` on, a tile for one row."""
    piece = tl.arange(0, COUNT // 32)
    piece = piece[None, :, None] if PIECES == 1 else piece[:, None, None]
    return start + piece * 32 + tl.arange(0, 32)[None, None, :]


@triton.jit
def by_row(x):
    """Values of rows [ROWS] beside a tile."""
    return x[:, None, None] if PIECES == 1 else x[None, :, None]


@triton.jit
def sum_row(x):
    """The sum of each row of a tile, [ROWS]."""
    return tl.sum(tl.sum(x, PIECES), 1)


@triton.jit
def load_scores(scores_ptr, offset, k_block, end):
    """Scores of the blocks k_block, a tile, of rows that start at `offset` [ROWS]; -inf beyond their `end`."""
    return tl.load(scores_ptr + by_row(offset) + k_block, mask=k_block < by_row(end), other=float("-inf"))


@triton.jit
def values_of(scores, highest, TOPK: tl.constexpr):
    """What the search compares: the scores, or under cdf their exponentials."""
    return scores if TOPK else tl.exp2(scores - highest)


@triton.jit
def rank_of(value, TOPK: tl.constexpr):
    """An integer for each value, in the order of the values; those of exponentials are their bits."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) if TOPK else bits


@triton.jit
def value_at(rank, TOPK: tl.constexpr):
    """The value of a rank."""
    return (tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank) if TOPK else rank).to(tl.float32, bitcast=True)


@triton.jit
def reach(values, threshold):
    """Which values reach the threshold of their row; NaN does."""
    return (values < by_row(threshold)) == 0


@triton.jit
def sums_from(values, threshold):
    """How many values reach the threshold of their row, and their sum; [ROWS]."""
    over = reach(values=values, threshold=threshold)
    return sum_row(over.to(tl.int32)), sum_row(tl.where(over, values, 0.0))


@triton.jit
def range_of(scores):
    """Number of visible blocks of each row, number of judged ones, and the largest and smallest of their scores; all
    [ROWS]."""
    judged = scores > UNJUDGED
    low = tl.where(judged, scores, float("inf"))
    return (sum_row((scores > float("-inf")).to(tl.int32)), sum_row(judged.to(tl.int32)),
            tl.max(tl.max(scores, PIECES), 1), tl.min(tl.min(low, PIECES), 1))


@triton.jit
def sum_judged(values, TOPK: tl.constexpr):
    """The sum of the values of judged blocks, [ROWS]; the exponentials of others are 0."""
    return sum_row(tl.where(values > UNJUDGED, values, 0.0) if TOPK else values)


@triton.jit
def between(low, above, low_sum, above_sum, n_low, n_above, TOPK: tl.constexpr, HALVE):
    """A rank above `low` and below `above`, [ROWS]: that of the mean of the values between, which splits them whether
    they lie close or far apart. Where rounding leaves none there, and where HALVE, the mean of the two."""
    mean = (low_sum - above_sum) / tl.maximum(n_low - n_above, 1).to(tl.float32)
    middle = rank_of(value=mean, TOPK=TOPK)
    halfway = (low & above) + ((low ^ above) >> 1)  # without overflow
    return tl.where((middle > low) & (middle < above) & (HALVE == 0), middle, halfway)


@triton.jit
def find_threshold(scores_ptr, offset, end, last, amount, keep_all, TOPK: tl.constexpr, ROWS: tl.constexpr,
                   RESIDENT: tl.constexpr, CHUNK: tl.constexpr):
    """(threshold, highest, n_visible) of rows of the map, [ROWS], of which the longest has `last` blocks: the largest
    value whose blocks reach the target, the largest judged score, which `values_of` needs, and the number of blocks
    that dense attention would visit.

    The target is a share `amount` of the probability, or under TOPK of the visible blocks; keep_all [ROWS] marks rows
    without one.
    """
    if last <= 64:  # so that short rows fill their tile
        threshold, highest, n_visible = search(
            scores_ptr=scores_ptr, offset=offset, end=end, last=last, amount=amount, keep_all=keep_all, TOPK=TOPK,
            ROWS=ROWS, RESIDENT=64 if RESIDENT > 64 else RESIDENT, MORE=RESIDENT < 64, CHUNK=CHUNK)
    else:
        threshold, highest, n_visible = search(
            scores_ptr=scores_ptr, offset=offset, end=end, last=last, amount=amount, keep_all=keep_all, TOPK=TOPK,
            ROWS=ROWS, RESIDENT=RESIDENT, MORE=True, CHUNK=CHUNK)
    return threshold, highest, n_visible


@triton.jit
def search(scores_ptr, offset, end, last, amount, keep_all, TOPK: tl.constexpr, ROWS: tl.constexpr,
           RESIDENT: tl.constexpr, MORE: tl.constexpr, CHUNK: tl.constexpr):
    """`find_threshold`. The first RESIDENT values of a row stay in registers; where there may be MORE, the others are
    read anew at every step.

    The search narrows a range of ranks: `low` always reaches the target, `above` never does. A row is settled when at
    most one block lies between them, or none can. Split at the mean of the values between, rows take 6 to 12 steps;
    every fourth step halves the range, so that none takes more than 128.
    """
    resident = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(0, RESIDENT), end=end)
    n_visible, n_judged, highest, lowest = range_of(resident)
    for start in range(RESIDENT, last if MORE else RESIDENT, CHUNK):
        scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(start, CHUNK), end=end)
        seen, judged, higher, lower = range_of(scores)
        n_visible, n_judged = n_visible + seen, n_judged + judged
        highest, lowest = tl.maximum(highest, higher), tl.minimum(lowest, lower)
    highest = tl.where(n_judged > 0, highest, 0.0)

    searched = (n_judged > 0) & (tl.where(keep_all, 1.0, amount) < 1.0)
    resident = values_of(scores=resident, highest=by_row(highest), TOPK=TOPK)
    low_sum = sum_judged(values=resident, TOPK=TOPK)
    for start in range(RESIDENT, last if MORE else RESIDENT, CHUNK):
        scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(start, CHUNK), end=end)
        low_sum += sum_judged(values=values_of(scores=scores, highest=by_row(highest), TOPK=TOPK), TOPK=TOPK)
    if TOPK:
        target = tl.minimum(tl.maximum(tl.ceil(amount * n_visible - 1e-3), 1.0), n_judged.to(tl.float32))
    else:
        target = low_sum * amount

    low = tl.where(searched, rank_of(value=values_of(scores=lowest, highest=highest, TOPK=TOPK), TOPK=TOPK), 0)
    above = tl.where(searched, rank_of(value=values_of(scores=highest, highest=highest, TOPK=TOPK), TOPK=TOPK) + 1, 0)
    n_low = n_judged
    n_above = tl.zeros([ROWS], tl.int32)
    above_sum = tl.zeros([ROWS], tl.float32)
    undecided = tl.max(tl.where(above > low + 1, n_low - n_above, 0), 0)
    step = 0
    while undecided > 1:
        step += 1
        middle = between(low=low, above=above, low_sum=low_sum, above_sum=above_sum, n_low=n_low, n_above=n_above,
                         TOPK=TOPK, HALVE=step % 4 == 0)
        threshold = value_at(rank=middle, TOPK=TOPK)
        n_middle, middle_sum = sums_from(values=resident, threshold=threshold)
        for start in range(RESIDENT, last if MORE else RESIDENT, CHUNK):
            scores = load_scores(scores_ptr=scores_ptr, offset=offset, k_block=block_tile(start, CHUNK), end=end)
            values = values_of(scores=scores, highest=by_row(highest), TOPK=TOPK)
            n_more, more = sums_from(values=values, threshold=threshold)
            n_middle, middle_sum = n_middle + n_more, middle_sum + more
        enough = (n_middle.to(tl.float32) if TOPK else middle_sum) >= target
        low, above = tl.where(enough, middle, low), tl.where(enough, above, middle)
        n_low, n_above = tl.where(enough, n_middle, n_low), tl.where(enough, n_above, n_middle)
        low_sum, above_sum = tl.where(enough, middle_sum, low_sum), tl.where(enough, above_sum, middle_sum)
        undecided = tl.max(tl.where(above > low + 1, n_low - n_above, 0), 0)
    return tl.where(searched, value_at(rank=low, TOPK=TOPK), float("-inf")), highest, n_visible

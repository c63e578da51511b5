"""The constants of K and V, from a sample of the tokens and so without another pass over them.

K and V each have a constant subtracted before they are rounded, and V is scaled by channel. Neither has to be exact:
softmax ignores what all keys share, and the weights of a row of attention sum to one, so that a constant taken from
every value comes back by one addition at the end.
"""
import triton
import triton.language as tl

from .primitives import rows_of

SAMPLE = 1024  # tokens a head that the constants are found from; all of them where there are no more
# A channel whose sample hardly varies is taken to vary by this share of the channel that varies most: a value that the
# sample missed then costs the other channels of its block no precision. Both formats of V have this range to spare.
_LEAST_SPREAD = tl.constexpr(2.0 ** -10)
SPLITS = 8  # programs a head that share the sample; each block of K and V combines what they found


@triton.jit
def sample_rows(k, v, padding, partial, sampled, split, row, batch, head,
                k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, n,
                D: tl.constexpr, DP: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, TILE: tl.constexpr,
                SAMPLE: tl.constexpr, SPLITS: tl.constexpr):
    """Sums and range of one share of the sampled tokens of a head."""
    cols = tl.arange(0, DP)
    k_sum = tl.zeros([TILE, DP], tl.float32)
    v_sum = tl.zeros([TILE, DP], tl.float32)
    v_high = tl.full([TILE, DP], float("-inf"), tl.float32)
    v_low = tl.full([TILE, DP], float("inf"), tl.float32)
    count = tl.zeros([TILE], tl.int32)
    first = split * (SAMPLE // SPLITS)
    # A share may lie beyond the end: of a negative range Triton 3.6 runs the remainder of an unrolled loop.
    last = tl.maximum(first, tl.minimum(first + SAMPLE // SPLITS, n))
    for start in tl.range(first, last, TILE, loop_unroll_factor=2):
        place = start + tl.arange(0, TILE)
        exists = (place < n) & (place < SAMPLE)
        # Multiples of the golden ratio modulo one spread evenly and keep no step with the rows of a picture.
        spread = ((place.to(tl.int64) * 2654435769) & 0xFFFFFFFF) * n >> 32
        tokens = tl.where(n <= SAMPLE, place, spread.to(tl.int32))
        if padding is not None:
            exists = exists & (tl.load(padding + batch.to(tl.int64) * n + tokens, mask=exists, other=1) == 0)
        mask = exists[:, None] & (cols < D)
        k_rows = rows_of(k, batch, head, tokens, k_stride_b, k_stride_h, k_stride_n, K_ALIGN)
        v_rows = rows_of(v, batch, head, tokens, v_stride_b, v_stride_h, v_stride_n, V_ALIGN)
        k_tile = tl.load(k_rows[:, None] + cols, mask=mask, other=0.0)
        x = tl.load(v_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        k_sum += k_tile.to(tl.float32)
        v_sum += x
        v_high = tl.where(mask, tl.maximum(v_high, x), v_high)
        v_low = tl.where(mask, tl.minimum(v_low, x), v_low)
        count += exists.to(tl.int32)
    slot = row * SPLITS + split
    partial += slot * 4 * DP + cols
    tl.store(partial, tl.sum(k_sum, 0))
    tl.store(partial + DP, tl.sum(v_sum, 0))
    tl.store(partial + 2 * DP, tl.max(v_high, 0))
    tl.store(partial + 3 * DP, tl.min(v_low, 0))
    tl.store(sampled + slot, tl.sum(count, 0))


@triton.jit
def _over_splits(partial, row, which: tl.constexpr, cols, DP: tl.constexpr, SPLITS: tl.constexpr):
    """The sum, or of what is the largest or the smallest that, over all shares of a head's sample; [DP]."""
    slots = partial + (row * SPLITS * 4 + which) * DP + cols
    found = tl.load(slots)
    for split in tl.static_range(1, SPLITS):
        x = tl.load(slots + split * 4 * DP)
        found = found + x if which < 2 else tl.maximum(found, x) if which == 2 else tl.minimum(found, x)
    return found


@triton.jit
def _count(sampled, row, SPLITS: tl.constexpr):
    return tl.maximum(tl.sum(tl.load(sampled + row * SPLITS + tl.arange(0, SPLITS)), 0), 1).to(tl.float32)


@triton.jit
def constant_of_keys(partial, sampled, row, cols, DP: tl.constexpr, SPLITS: tl.constexpr):
    """What is subtracted from the keys of a head, [DP]."""
    return _over_splits(partial, row, 0, cols, DP, SPLITS) / _count(sampled, row, SPLITS)


@triton.jit
def constants_of_values(partial, sampled, row, cols, reach, DP: tl.constexpr, SPLITS: tl.constexpr):
    """What is subtracted from the values of a head, and the scale that makes the largest sampled one `reach`; [DP].

    Where nothing was sampled, or the same value everywhere, the scale is tiny, and each block has a step of its own.
    """
    centre = _over_splits(partial, row, 1, cols, DP, SPLITS) / _count(sampled, row, SPLITS)
    high = _over_splits(partial, row, 2, cols, DP, SPLITS)
    low = _over_splits(partial, row, 3, cols, DP, SPLITS)
    spread = tl.maximum(high - centre, centre - low)
    return centre, tl.maximum(tl.maximum(spread, tl.max(spread, 0) * _LEAST_SPREAD), 1e-12) / reach

"""The constants of K and V, from a sample of the tokens and so without another pass over them.

K and V each have a constant subtracted before they are rounded, and V is scaled by channel. Neither has to be exact:
softmax ignores what all keys share, and the weights of a row of attention sum to one, so that a constant taken from
every value comes back by one addition at the end.
"""
import triton
import triton.language as tl

from .primitives import rows_of

SAMPLE = 1024  # tokens a head that the constants are found from; all of them where there are no more
SPLITS = 16  # programs a head that share the sample


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
    for start in range(split * (SAMPLE // SPLITS), tl.minimum((split + 1) * (SAMPLE // SPLITS), n), TILE):
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
        k_sum += tl.load(k_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(v_rows[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
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
def constants_kernel(partial, sampled, k_constant, v_centre, v_scale, v_reach,
                      D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """Constants of K and V and V's scale of one head, from its sample."""
    row = tl.program_id(0)
    cols = tl.arange(0, DP)
    splits = row * SPLITS + tl.arange(0, SPLITS)
    count = tl.maximum(tl.sum(tl.load(sampled + splits), 0), 1).to(tl.float32)
    tile = partial + splits[:, None] * 4 * DP + cols
    centre = tl.sum(tl.load(tile + DP), 0) / count
    reach = tl.maximum(tl.max(tl.load(tile + 2 * DP), 0) - centre, centre - tl.min(tl.load(tile + 3 * DP), 0))
    tl.store(k_constant + row * DP + cols, tl.sum(tl.load(tile), 0) / count)
    tl.store(v_centre + row * D + cols, centre, mask=cols < D)
    tl.store(v_scale + row * D + cols, tl.maximum(reach, 1e-12) / v_reach, mask=cols < D)

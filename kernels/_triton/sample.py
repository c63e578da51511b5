"""The constants of K and V, from a sample of the tokens and so without another pass over them.

K and V each have a constant subtracted before they are rounded, and V is scaled by channel. Neither has to be exact:
softmax ignores what all keys share, and the weights of a row of attention sum to one, so that a constant taken from
every value comes back by one addition at the end.
"""
import triton
import triton.language as tl

from ..formats import LEAST_SPREAD
from .primitives import row_pointers, without_padding

SAMPLE = 1024  # tokens a head that the constants are found from; all of them where there are no more
SPLITS = 8  # programs a head that share the sample; each block of K and V combines what they found
_LEAST_SPREAD = tl.constexpr(LEAST_SPREAD)
# Rows of SampledStatistics.partial.
_K_SUM, _V_SUM, _V_MAX, _V_MIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def sampled_tokens(places, k_tokens, SAMPLE: tl.constexpr):
    """Tokens at `places` of the sample: all in turn where there are no more than SAMPLE, else spread evenly."""
    # Multiples of the golden ratio modulo one spread evenly and keep no step with the rows of a picture.
    spread = ((places.to(tl.int64) * 2654435769) & 0xFFFFFFFF) * k_tokens >> 32
    return tl.where(k_tokens <= SAMPLE, places, spread.to(tl.int32))


@triton.jit
def sample_keys_and_values(
        # inputs
        k_ptr, v_ptr, padding_ptr,
        # outputs
        partial_ptr, sampled_ptr,
        # sizes
        split, kv_batch_head, batch, kv_head, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
        k_tokens,
        # constants
        D: tl.constexpr, PADDED_D: tl.constexpr, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, TILE: tl.constexpr,
        SAMPLE: tl.constexpr, SPLITS: tl.constexpr):
    """Sums and range of one share of the sampled tokens of a head, into its rows of partial_ptr and sampled_ptr."""
    channels = tl.arange(0, PADDED_D)
    k_sum = tl.zeros([TILE, PADDED_D], tl.float32)
    v_sum = tl.zeros([TILE, PADDED_D], tl.float32)
    v_max = tl.full([TILE, PADDED_D], float("-inf"), tl.float32)
    v_min = tl.full([TILE, PADDED_D], float("inf"), tl.float32)
    count = tl.zeros([TILE], tl.int32)
    first = split * (SAMPLE // SPLITS)
    # A share may lie beyond the end: of a negative range Triton 3.6 runs the remainder of an unrolled loop.
    last = tl.maximum(first, tl.minimum(first + SAMPLE // SPLITS, k_tokens))
    for start in tl.range(first, last, TILE, loop_unroll_factor=2):
        places = start + tl.arange(0, TILE)
        exists = (places < k_tokens) & (places < SAMPLE)
        tokens = sampled_tokens(places=places, k_tokens=k_tokens, SAMPLE=SAMPLE)
        exists = without_padding(exists=exists, tokens=tokens, padding_ptr=padding_ptr, batch=batch, n_tokens=k_tokens)
        mask = exists[:, None] & (channels < D)  # [TILE, PADDED_D]
        k_rows = row_pointers(x_ptr=k_ptr, batch=batch, head=kv_head, tokens=tokens, stride_b=k_stride_b,
                              stride_h=k_stride_h, stride_n=k_stride_n, ALIGN=K_ALIGN)
        v_rows = row_pointers(x_ptr=v_ptr, batch=batch, head=kv_head, tokens=tokens, stride_b=v_stride_b,
                              stride_h=v_stride_h, stride_n=v_stride_n, ALIGN=V_ALIGN)
        k = tl.load(k_rows[:, None] + channels, mask=mask, other=0.0)  # [TILE, PADDED_D]
        v = tl.load(v_rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        k_sum += k.to(tl.float32)
        v_sum += v
        v_max = tl.where(mask, tl.maximum(v_max, v), v_max)
        v_min = tl.where(mask, tl.minimum(v_min, v), v_min)
        count += exists.to(tl.int32)
    share = kv_batch_head * SPLITS + split
    partial_ptr += share * 4 * PADDED_D + channels
    tl.store(partial_ptr + _K_SUM * PADDED_D, tl.sum(k_sum, 0))
    tl.store(partial_ptr + _V_SUM * PADDED_D, tl.sum(v_sum, 0))
    tl.store(partial_ptr + _V_MAX * PADDED_D, tl.max(v_max, 0))
    tl.store(partial_ptr + _V_MIN * PADDED_D, tl.min(v_min, 0))
    tl.store(sampled_ptr + share, tl.sum(count, 0))


@triton.jit
def _over_splits(partial_ptr, kv_batch_head, ROW: tl.constexpr, channels, PADDED_D: tl.constexpr,
                 SPLITS: tl.constexpr):
    """One row of the statistics over all shares of a head's sample: their sum, maximum or minimum, [PADDED_D]."""
    pointers = partial_ptr + (kv_batch_head * SPLITS * 4 + ROW) * PADDED_D + channels
    found = tl.load(pointers)
    for split in tl.static_range(1, SPLITS):
        x = tl.load(pointers + split * 4 * PADDED_D)
        found = found + x if ROW < _V_MAX else tl.maximum(found, x) if ROW == _V_MAX else tl.minimum(found, x)
    return found


@triton.jit
def _sampled_count(sampled_ptr, kv_batch_head, SPLITS: tl.constexpr):
    """Number of sampled tokens of a head, at least one."""
    counts = tl.load(sampled_ptr + kv_batch_head * SPLITS + tl.arange(0, SPLITS))
    return tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)


@triton.jit
def centre_of_keys(partial_ptr, sampled_ptr, kv_batch_head, channels, PADDED_D: tl.constexpr, SPLITS: tl.constexpr):
    """What is subtracted from the keys of a head, [PADDED_D]."""
    return (_over_splits(partial_ptr, kv_batch_head, _K_SUM, channels, PADDED_D, SPLITS)
            / _sampled_count(sampled_ptr, kv_batch_head, SPLITS))


@triton.jit
def centre_and_scale_of_values(partial_ptr, sampled_ptr, kv_batch_head, channels, PADDED_D: tl.constexpr,
                               SPLITS: tl.constexpr):
    """What is subtracted from the values of a head, and the scale that makes the largest sampled one 1; both
    [PADDED_D].

    Where nothing was sampled, or the same value everywhere, the scale is tiny, and each block has a scale of its own.
    """
    centre = (_over_splits(partial_ptr, kv_batch_head, _V_SUM, channels, PADDED_D, SPLITS)
              / _sampled_count(sampled_ptr, kv_batch_head, SPLITS))
    v_max = _over_splits(partial_ptr, kv_batch_head, _V_MAX, channels, PADDED_D, SPLITS)
    v_min = _over_splits(partial_ptr, kv_batch_head, _V_MIN, channels, PADDED_D, SPLITS)
    spread = tl.maximum(v_max - centre, centre - v_min)
    return centre, tl.maximum(tl.maximum(spread, tl.max(spread, 0) * _LEAST_SPREAD), 1e-12)

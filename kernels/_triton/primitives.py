"""Device helpers that several kernels share, and the host's side of how they address memory.

Strides reach the kernels as 64-bit numbers in units of ALIGN elements. ALIGN is 8 where every stride allows 16-byte
loads and 1 elsewhere: the compiler sees the alignment although sizes and strides are plain run-time values, so that a
new length, batch or number of heads never compiles again. The same device limits stores of bytes: a row of PITCH bytes
is addressed as `row_stores` times STORE, so that a thread stores no more than STORE of them at once.
"""
import math

import torch
import triton
import triton.language as tl

# The stored similarity of a block that the caller wants exact, because it holds a dense query or a sink. It lies below
# every threshold, so that the comparison which keeps badly described blocks keeps these too; a tensor of flags would be
# one more load for every block. `mark_forced` alone writes it and `kept_by_rule` alone reads it.
FORCED = tl.constexpr(float("-inf"))


def token_strides(x: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """((batch, head, token) strides of x (B, H, N, D) in units of align, align)."""
    batch, head, token, _ = x.stride()
    align = 8 if math.gcd(batch, head, token, 8) == 8 and x.data_ptr() % 16 == 0 else 1
    return (batch // align, head // align, token // align), align


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_pitch(dim: int) -> int:
    """Elements from one stored row of a head_dim to the next: whole sectors of memory, 32 bytes in INT8. Beyond 128
    whole tiles, because the tensor memory accelerator is slow where a part of a tile lies outside of all rows."""
    return round_up(dim, 32) if dim <= 128 else sum(channel_tiles(dim))


def padded_dim(dim: int) -> int:
    """The power of two, at least the 32 that INT8 products need, that a head_dim fills up to in registers."""
    return 1 << (max(dim, 32) - 1).bit_length()


def channel_tiles(dim: int) -> tuple[int, int]:
    """Channels of the two tiles in which attention takes a head_dim where they hold fewer than one would; of that one
    and 0 elsewhere."""
    one, two = padded_dim(dim), (padded_dim(dim) // 2, padded_dim(dim - padded_dim(dim) // 2))
    return two if sum(two) < one else (one, 0)


def order_rows(order: torch.Tensor | None) -> int:
    """Rows of an order: one for all heads, or one a key head."""
    return 1 if order is None or order.ndim == 1 else order.shape[0]


@triton.jit
def row_pointers(x_ptr, batch, head, tokens, stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """Pointers to the first element of the rows of `tokens` [N] in one head of x (B, H, N, D)."""
    head_ptr = x_ptr + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * ALIGN
    return head_ptr + (tokens.to(tl.int64) * stride_n) * ALIGN


@triton.jit
def tokens_at(places, order_ptr, order_row, n_tokens):
    """Tokens at `places` of the blocking order: a row of order_ptr (rows, n_tokens), or the model's own order."""
    if order_ptr is None:
        return places
    else:
        return tl.load(order_ptr + order_row.to(tl.int64) * n_tokens + places, mask=places < n_tokens, other=0)


@triton.jit
def without_padding(exists, tokens, padding_ptr, batch, n_tokens):
    """`exists`, less the tokens that padding_ptr (B, n_tokens), if there is one, marks as padding."""
    if padding_ptr is not None:
        exists = exists & (tl.load(padding_ptr + batch.to(tl.int64) * n_tokens + tokens, mask=exists, other=1) == 0)
    return exists


@triton.jit
def threshold_of(per_head_ptr, ROW: tl.constexpr, head, heads, value):
    """A threshold of this head: ROW of the table per_head_ptr (3, heads), or the plain `value` where there is none."""
    if per_head_ptr is None:
        return value
    else:
        return tl.load(per_head_ptr + ROW * heads + head)


@triton.jit
def in_groups(x, GROUPS: tl.constexpr):
    """x [N] as [GROUPS, 1, N / GROUPS]."""
    return tl.reshape(x, [GROUPS, 1, x.shape[0] // GROUPS])


@triton.jit
def channels_in_groups(PADDED_D: tl.constexpr, GROUPS: tl.constexpr):
    """The channels as `in_groups` has them, in a form of which the compiler sees that they follow each other."""
    first = tl.arange(0, GROUPS) * (PADDED_D // GROUPS)
    return first[:, None, None] + tl.arange(0, PADDED_D // GROUPS)[None, None, :]


@triton.jit
def mixed(x):
    """The Hadamard transform of x [8, ROWS, CHANNELS] along its groups. The scalar product of two rows becomes 8 times
    as large.

    INT8 has one scale for large and small channels. Mixed, they are alike, and the scores of trained models have 0.6 to
    0.9 of the error. Neighbours are much alike as they are, so channels are mixed that lie far apart.
    """
    x = tl.reshape(x, [2, 2, 2, x.shape[1], x.shape[2]])
    for _ in tl.static_range(3):
        even, odd = tl.split(tl.permute(x, [1, 2, 3, 4, 0]))
        x = tl.permute(tl.join(even + odd, even - odd), [0, 1, 4, 2, 3])
    return tl.reshape(x, [8, x.shape[3], x.shape[4]])


@triton.jit
def warp_uniform(number, PTX: tl.constexpr):
    """`number`, an int32 scalar that is the same in all threads; under PTX the assembler learns that, and keeps what
    follows from it, such as a loop's counter and addresses, in registers of a warp and not of each thread."""
    if PTX:
        number = tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [number],
                                           dtype=tl.int32, is_pure=True, pack=1)
    return number


@triton.jit
def block_similarity(x, mean, count, JUDGED: tl.constexpr):
    """Mean cosine over all pairs of rows of x [N, D], of which `count` are not zero; 1 where no threshold asks for it,
    that is unless JUDGED. NaN if x holds NaN or infinity. mean: of the rows, [D]."""
    if JUDGED:
        inverse_norm = tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24))
        mean = tl.sum(x * inverse_norm[:, None], 0) / count
        return tl.sum(mean * mean, 0)
    else:
        return tl.sum(mean * 0.0, 0) + 1.0


@triton.jit
def mark_forced(similarity, flags_ptr, tokens, exists):
    """The similarity to store for a block: FORCED where one of its tokens is flagged in flags_ptr (n_tokens,)."""
    if flags_ptr is not None:
        flagged = tl.max(tl.load(flags_ptr + tokens, mask=exists, other=0), 0)
        similarity = tl.where(flagged > 0, FORCED, similarity)
    return similarity


@triton.jit
def kept_by_rule(similarity, threshold):
    """Which blocks are kept whatever their score: FORCED ones, ones that their mean describes badly, and NaN's."""
    return (similarity >= threshold) == 0


@triton.jit
def to_int8(x):
    """Round to the nearest integer; |x| ≤ 127. Adding 1.5·2^23 leaves the integer in the lowest bits of the float."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)

"""Device helpers that several kernels share, and the host's side of how they address memory.

Strides reach the kernels as 64-bit numbers in units of ALIGN elements. ALIGN is 8 where every stride allows 16-byte
loads and 1 elsewhere: the compiler sees the alignment although sizes and strides are plain run-time values, so that a
new length, batch or number of heads never compiles again. The same device limits stores: rows of bytes are `pitch`
times STORE long, so that a thread stores no more than STORE of them.
"""
import torch
import triton
import triton.language as tl


def token_strides(x: torch.Tensor) -> tuple[tuple[int, int, int], int]:
    """((batch, head, token) strides of x (B, H, N, D) in units of align, align)."""
    strides = x.stride()[:3]
    align = 8 if all(s % 8 == 0 for s in strides) and x.data_ptr() % 16 == 0 else 1
    return tuple(s // align for s in strides), align


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded_dim(dim: int) -> int:
    """The power of two, at least the 32 that INT8 products need, that a head_dim fills up to in registers."""
    return 1 << (max(dim, 32) - 1).bit_length()


def order_rows(order: torch.Tensor | None) -> int:
    """Rows of an order: one for all heads, or one a key head."""
    return 1 if order is None or order.ndim == 1 else order.shape[0]


@triton.jit
def rows_of(x, batch, head, rows, stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """Pointers to the first element of rows [N] of one head."""
    base = x + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * ALIGN
    return base + (rows.to(tl.int64) * stride_n) * ALIGN


@triton.jit
def token_at(order, row, rows, n):
    """Tokens that stand at `rows` of the blocking order; `order` is (heads, n), read at `row`, or None."""
    if order is None:
        return rows
    else:
        return tl.load(order + row.to(tl.int64) * n + rows, mask=rows < n, other=0)


@triton.jit
def threshold_of(table, row: tl.constexpr, head, heads, value):
    """A threshold of this head: from the table (3, heads), or the plain number where there is none."""
    if table is None:
        return value
    else:
        return tl.load(table + row * heads + head)


@triton.jit
def block_similarity(x, count):
    """Mean cosine over all pairs of rows of x [N, D], of which `count` are not zero; NaN if x holds NaN or infinity."""
    inverse_norm = tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24))
    mean = tl.sum(x * inverse_norm[:, None], 0) / count
    return tl.sum(mean * mean, 0)


@triton.jit
def to_int8(x):
    """Round to the nearest integer; |x| ≤ 127. Adding 1.5·2^23 leaves the integer in the lowest bits of the float."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)

"""The last lines of attention: its results in the caller's units and order, with a residual added or made."""
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..types import Residual, SpargeStats
from .primitives import row_pointers, to_int8, tokens_at


@dataclass(frozen=True)
class Target:
    """Where attention is written, all of the same heads.

    out: (B, H, Nq, D), any strides with a contiguous last dimension.
    residual: takes what `out`, which then is dense attention and stays as it is, has beyond the result; or None.
    lse: takes the log-sum-exp of the scores with the constant of K missing, float32 (B, H, Nq); or None.
    stats: takes the statistics; or None.
    """

    out: Tensor
    residual: Residual | None = None
    lse: Tensor | None = None
    stats: SpargeStats | None = None

    def heads(self, which: slice) -> Target:
        """The same for some of the heads."""
        return Target(self.out[:, which], self.residual and self.residual.heads(which.start, which.stop),
                      None if self.lse is None else self.lse[:, which],
                      self.stats and SpargeStats(self.stats.kept[:, which], self.stats.pv_skipped[:, which]))


@triton.jit
def write_output(
        acc, total, v_scale_ptr, v_centre_ptr, order_ptr, residual_ptr, residual_scale_ptr, out_ptr, made_ptr,
        made_scale_ptr, kv_batch_head, batch, head, group, order_rows, q_places, stride_b, stride_h, stride_n, q_tokens,
        residual_batch, D: tl.constexpr, PADDED_D: tl.constexpr, ALIGN: tl.constexpr, INT8_MAX: tl.constexpr):
    """Write acc / total in the units of V to the tokens at q_places, zero in rows that saw no key, plus the residual if
    there is one; or write what out_ptr has beyond it, if that is to be made."""
    channels = tl.arange(0, PADDED_D)
    scale = tl.load(v_scale_ptr + kv_batch_head * D + channels, mask=channels < D, other=0.0)
    centre = tl.load(v_centre_ptr + kv_batch_head * D + channels, mask=channels < D, other=0.0)
    out = tl.where(total[:, None] == 0, 0.0, acc / total[:, None] * scale[None, :] + centre[None, :])
    tokens = tokens_at(places=q_places, order_ptr=order_ptr, order_row=(head // group) % order_rows, n_tokens=q_tokens)
    rows = row_pointers(x_ptr=out_ptr, batch=batch, head=head, tokens=tokens, stride_b=stride_b, stride_h=stride_h,
                        stride_n=stride_n, ALIGN=ALIGN)
    exists = q_places < q_tokens
    mask = exists[:, None] & (channels < D)
    if residual_ptr is not None:
        row = rows_of(batch=batch, head=head, tokens=tokens, q_tokens=q_tokens, batch_rows=residual_batch)
        residual = tl.load(residual_ptr + row[:, None] * D + channels, mask=mask, other=0)  # [BLOCK_Q, PADDED_D] int8
        out += residual.to(tl.float32) * tl.load(residual_scale_ptr + row, mask=exists, other=0.0)[:, None]
    if made_ptr is not None:
        row = rows_of(batch=batch, head=head, tokens=tokens, q_tokens=q_tokens, batch_rows=residual_batch)
        residual = tl.load(rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32) - out
        residual = tl.where(mask & (tl.abs(residual) < float("inf")), residual, 0.0)  # NaN is not below infinity
        scale = tl.max(tl.abs(residual), 1) / INT8_MAX
        tl.store(made_scale_ptr + row, scale, mask=exists)
        residual /= tl.maximum(scale, 1e-30)[:, None]
        tl.store(made_ptr + row[:, None] * D + channels, to_int8(residual), mask=mask)
    else:
        tl.store(rows[:, None] + channels, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_lse(total, running_max, order_ptr, lse_ptr, batch, head, group, order_rows, q_places, q_tokens, lse_batch,
              P_SHIFT: tl.constexpr):
    """Write the natural logarithm of `total` [BLOCK_Q], less its factor 2^(P_SHIFT - running_max); -inf without a key.
    """
    tokens = tokens_at(places=q_places, order_ptr=order_ptr, order_row=(head // group) % order_rows, n_tokens=q_tokens)
    row = rows_of(batch=batch, head=head, tokens=tokens, q_tokens=q_tokens, batch_rows=lse_batch)
    lse = tl.where(total == 0, float("-inf"), running_max - P_SHIFT + tl.log2(total))
    tl.store(lse_ptr + row, lse * 0.6931471805599453, mask=q_places < q_tokens)


@triton.jit
def rows_of(batch, head, tokens, q_tokens, batch_rows):
    """Rows of `tokens` [N] in a tensor (B, H, q_tokens, …) with batch_rows rows from one batch entry to the next."""
    return batch.to(tl.int64) * batch_rows + head.to(tl.int64) * q_tokens + tokens

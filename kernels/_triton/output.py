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
        acc, acc_rest, total, v_scale_ptr, v_centre_ptr, order_ptr, residual_ptr, residual_scale_ptr, lead, out_ptr,
        made_ptr, made_scale_ptr, kv_batch_head, batch, head, group, order_rows, q_places, stride_b, stride_h, stride_n,
        q_tokens, residual_batch, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGN: tl.constexpr,
        INT8_MAX: tl.constexpr):
    """Write acc / total in the units of V to the tokens at q_places, zero in rows that saw no key, plus the residual if
    there is one. Or make a residual: what out_ptr has beyond acc / total, and `lead` times what that has beyond the
    earlier residual if there is one. Of the channels from MAIN on: acc_rest."""
    tokens = tokens_at(places=q_places, order_ptr=order_ptr, order_row=(head // group) % order_rows, n_tokens=q_tokens)
    rows = row_pointers(x_ptr=out_ptr, batch=batch, head=head, tokens=tokens, stride_b=stride_b, stride_h=stride_h,
                        stride_n=stride_n, ALIGN=ALIGN)
    exists = q_places < q_tokens
    row = rows_of(batch=batch, head=head, tokens=tokens, q_tokens=q_tokens, batch_rows=residual_batch)
    MAKES: tl.constexpr = made_ptr is not None
    out = _of_channels(
        acc=acc, total=total, v_scale_ptr=v_scale_ptr, v_centre_ptr=v_centre_ptr, residual_ptr=residual_ptr,
        residual_scale_ptr=residual_scale_ptr, lead=lead, rows=rows, kv_batch_head=kv_batch_head, row=row,
        exists=exists, D=D, FIRST=0, CHANNELS=MAIN, MAKES=MAKES)
    rest = out
    if REST:
        rest = _of_channels(
            acc=acc_rest, total=total, v_scale_ptr=v_scale_ptr, v_centre_ptr=v_centre_ptr, residual_ptr=residual_ptr,
            residual_scale_ptr=residual_scale_ptr, lead=lead, rows=rows, kv_batch_head=kv_batch_head, row=row,
            exists=exists, D=D, FIRST=MAIN, CHANNELS=REST, MAKES=MAKES)
    if MAKES:
        largest = tl.max(tl.abs(out), 1)
        if REST:
            largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
        scale = largest / INT8_MAX
        tl.store(made_scale_ptr + row, scale, mask=exists)
        made = made_ptr + row * D
        divisor = tl.maximum(scale, 1e-30)[:, None]
        _store(made, to_int8(out / divisor), exists, D, 0, MAIN)
        if REST:
            _store(made, to_int8(rest / divisor), exists, D, MAIN, REST)
    else:
        _store(rows, out.to(out_ptr.dtype.element_ty), exists, D, 0, MAIN)
        if REST:
            _store(rows, rest.to(out_ptr.dtype.element_ty), exists, D, MAIN, REST)


@triton.jit
def _of_channels(
        acc, total, v_scale_ptr, v_centre_ptr, residual_ptr, residual_scale_ptr, lead, rows, kv_batch_head, row, exists,
        D: tl.constexpr, FIRST: tl.constexpr, CHANNELS: tl.constexpr, MAKES: tl.constexpr):
    """What is to be written of the channels from FIRST on, [BLOCK_Q, CHANNELS]: as in `write_output`. What is not
    finite in a residual is zero. row [BLOCK_Q]: of residuals. rows: pointers to the rows of out_ptr."""
    channels = FIRST + tl.arange(0, CHANNELS)
    mask = exists[:, None] & (channels < D)
    scale = tl.load(v_scale_ptr + kv_batch_head * D + channels, mask=channels < D, other=0.0)
    centre = tl.load(v_centre_ptr + kv_batch_head * D + channels, mask=channels < D, other=0.0)
    out = tl.where(total[:, None] == 0, 0.0, acc / total[:, None] * scale[None, :] + centre[None, :])
    if MAKES:  # dense attention less that
        out = tl.load(rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32) - out
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * D + channels, mask=mask, other=0)  # [BLOCK_Q, CHANNELS] int8
        residual = residual.to(tl.float32) * tl.load(residual_scale_ptr + row, mask=exists, other=0.0)[:, None]
        if MAKES:
            out += lead * (out - residual)
        else:
            out += residual
    if MAKES:
        out = tl.where(mask & (tl.abs(out) < float("inf")), out, 0.0)  # NaN is not below infinity
    return out


@triton.jit
def _store(rows, x, exists, D: tl.constexpr, FIRST: tl.constexpr, CHANNELS: tl.constexpr):
    """Store x [BLOCK_Q, CHANNELS] in the rows that exist, from channel FIRST on."""
    channels = FIRST + tl.arange(0, CHANNELS)
    tl.store(rows[:, None] + channels, x, mask=exists[:, None] & (channels < D))


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

"""The last lines of attention: its result in the caller's units and order, with a residual added or made from it."""
import triton
import triton.language as tl

from .primitives import row_pointers, to_int8, tokens_at


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
        row = residual_rows(batch=batch, head=head, tokens=tokens, q_tokens=q_tokens, residual_batch=residual_batch)
        residual = tl.load(residual_ptr + row[:, None] * D + channels, mask=mask, other=0)  # [BLOCK_Q, PADDED_D] int8
        out += residual.to(tl.float32) * tl.load(residual_scale_ptr + row, mask=exists, other=0.0)[:, None]
    if made_ptr is not None:
        row = residual_rows(batch=batch, head=head, tokens=tokens, q_tokens=q_tokens, residual_batch=residual_batch)
        residual = tl.load(rows[:, None] + channels, mask=mask, other=0.0).to(tl.float32) - out
        residual = tl.where(mask & (tl.abs(residual) < float("inf")), residual, 0.0)  # NaN is not below infinity
        scale = tl.max(tl.abs(residual), 1) / INT8_MAX
        tl.store(made_scale_ptr + row, scale, mask=exists)
        residual /= tl.maximum(scale, 1e-30)[:, None]
        tl.store(made_ptr + row[:, None] * D + channels, to_int8(residual), mask=mask)
    else:
        tl.store(rows[:, None] + channels, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_rows(batch, head, tokens, q_tokens, residual_batch):
    """Rows of `tokens` [N] in a residual (B, H, q_tokens, D) with residual_batch rows between batch entries."""
    return batch.to(tl.int64) * residual_batch + head.to(tl.int64) * q_tokens + tokens

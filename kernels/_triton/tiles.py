"""Tiles of the prepared tensors that the attention kernel loads: through a descriptor under TMA, else by pointers."""
import triton
import triton.language as tl


@triton.jit
def load_tile(source, row, PITCH: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
              TMA: tl.constexpr):
    """Rows from `row` on and columns from FIRST on of a matrix whose rows are PITCH long, [ROWS, COLS], zero past the
    pitch; `source` is a descriptor under TMA, a pointer elsewhere."""
    if TMA:
        return source.load([row, FIRST])
    else:
        rows = row.to(tl.int64) + tl.arange(0, ROWS)
        cols = FIRST + tl.arange(0, COLS)
        if PITCH < FIRST + COLS:
            return tl.load(source + rows[:, None] * PITCH + cols, mask=(cols < PITCH)[None, :], other=0)
        else:
            return tl.load(source + rows[:, None] * PITCH + cols)


@triton.jit
def load_channels(source, row, column, pitch, ROWS: tl.constexpr, COLS: tl.constexpr, LIMIT: tl.constexpr,
                  TMA: tl.constexpr):
    """A tile of transposed values, [ROWS, COLS]; rows are channels, of which LIMIT exist."""
    if TMA:
        return source.load([row, column])
    else:
        rows = tl.arange(0, ROWS)
        pointers = source + (row + rows).to(tl.int64)[:, None] * pitch + column + tl.arange(0, COLS)
        if LIMIT < ROWS:
            return tl.load(pointers, mask=rows[:, None] < LIMIT, other=0)
        else:
            return tl.load(pointers)


@triton.jit
def load_pooled(source, kv_batch_head, k_blocks, start, PITCH: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
                COLS: tl.constexpr, TMA: tl.constexpr):
    """Pooled keys or values of a head from block `start` and channel FIRST on, [ROWS, COLS]; finite beyond the last
    block."""
    if TMA:
        return source.load([kv_batch_head * k_blocks + start, FIRST])
    else:
        rows = start + tl.arange(0, ROWS)
        cols = FIRST + tl.arange(0, COLS)
        pointers = source + (kv_batch_head.to(tl.int64) * k_blocks + rows)[:, None] * PITCH + cols
        return tl.load(pointers, mask=(rows < k_blocks)[:, None] & (cols < PITCH), other=0)

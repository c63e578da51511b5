"""Token orders of a T × H × W grid and of a sequence that holds one, their inverses, and a bounded cache of both.

Tokens are numbered row by row: token (t, y, x) has index (t * H + y) * W + x. An order lists indices in visiting order,
so `x[:, order]` sorts tokens along a curve and `x[:, inverse(order)]` brings them back.
"""
from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .curve import hilbert_path

Grid = tuple[int, int, int]
_MAX_INDEX = torch.iinfo(torch.int32).max


def grid_order(grid: Grid, curve: str = "hilbert") -> Tensor:
    """The tokens of a (T, H, W) grid in the order in which a curve visits them: int32 (T·H·W,) on the CPU.

    Every curve is a permutation. `curve` is one of
    - "hilbert": every step goes to a direct neighbour (one coordinate changes by one), whatever the sizes; where all
      sizes are multiples of 4 (of 8 for a single frame), each run of 64 tokens fills a box, such as 4 × 4 × 4;
    - "row-major": the identity, x fastest, then y, then t;
    - "column-major": frame by frame, each column by column from top to bottom: y fastest, then x, then t;
    - "time-major": all frames of a position together: t fastest, then x, then y;
    - "blocked": boxes of 4 × 4 × 4 (8 × 8 where T = 1), cut off at the far sides of the grid, row-major inside and
      among each other.

    Orders are cached; the tensor returned is a copy and the caller's own. Raises ValueError for anything but three
    integers ≥ 1 whose product fits int32, and for an unknown curve.
    """
    return _grid_order(_checked(grid, curve), curve).clone()


def sequence_order(grid: Grid, *, before: int = 0, after: int = 0, curve: str = "hilbert", grid_first: bool = False,
                   device: torch.device | str = "cpu") -> Tensor:
    """The order of a sequence of `before` other tokens, the tokens of a (T, H, W) grid, and `after` other tokens.

    The grid's tokens follow the curve; text and other tokens keep their own order, and stay where they are or, with
    `grid_first`, all come after the grid, whose boxes then fill blocks exactly. Returns int32
    (before + T·H·W + after,) on `device`. Orders are cached for each device, so repeated calls copy nothing between
    host and device; the tensor returned is a copy and the caller's own. Raises ValueError as `grid_order` does, and for
    counts that are no integers ≥ 0.
    """
    grid = _checked(grid, curve)
    for name, count in (("before", before), ("after", after)):
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {count!r}")
    total = before + math.prod(grid) + after
    if total > _MAX_INDEX:
        raise ValueError(f"before + T*H*W + after must be at most {_MAX_INDEX} (indices are int32), got {total}")
    device = torch.empty(0, device=device).device  # "cuda" means the current one: give it its number

    def build() -> Tensor:
        left, _, right = torch.arange(total, dtype=torch.int32).split([before, math.prod(grid), after])
        inside = _grid_order(grid, curve) + before
        return torch.cat([inside, left, right] if grid_first else [left, inside, right]).to(device)

    return _cache.get((grid, curve, before, after, grid_first, device), build).clone()


def free_device_orders() -> None:
    """Drop the copies of cached orders on other devices than the CPU, to which later calls copy them again."""
    _cache.keep_on_host()


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, (N,) or (…, N) with a permutation in each row; same dtype and device."""
    if order.dim() == 0 or order.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"order must be int32 or int64 of shape (..., N), got {order.dtype} of {tuple(order.shape)}")
    ranks = torch.arange(order.shape[-1], dtype=order.dtype, device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order.long(), ranks)


class OrderCache:
    """Tensors by key, the least recently used dropped so that at most `capacity` elements are kept; thread-safe.

    Each is built once, on the CPU unless the builder says otherwise, and as an ordinary tensor even in inference mode,
    so that it serves both modes.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: a sequence's builder asks for its grid's order

    @property
    def elements(self) -> int:
        with self._lock:
            return sum(order.numel() for order in self._entries.values())

    def keep_on_host(self) -> None:
        """Drop the tensors that lie on other devices."""
        with self._lock:
            for key in [key for key, order in self._entries.items() if order.device.type != "cpu"]:
                del self._entries[key]

    def get(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            with torch.inference_mode(False), torch.device("cpu"):
                order = build()
            self._entries[key] = order
            while self.elements > self.capacity:
                self._entries.popitem(last=False)
            return order


_cache = OrderCache(capacity=1 << 22)  # 16 MiB


def _grid_order(grid: Grid, curve: str) -> Tensor:
    return _cache.get((grid, curve), lambda: _CURVES[curve](grid))


def _checked(grid: Grid, curve: str) -> Grid:
    if curve not in CURVES:
        raise ValueError(f"curve must be one of {', '.join(CURVES)}, got {curve!r}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 3 or any(type(n) is not int or n < 1 for n in grid):
        raise ValueError(f"grid must be three integers >= 1 (T, H, W), got {grid!r}")
    if math.prod(grid) > _MAX_INDEX:
        raise ValueError(f"grid must have at most {_MAX_INDEX} tokens (indices are int32), got {math.prod(grid)}")
    return tuple(grid)


def _hilbert(grid: Grid) -> Tensor:
    t, y, x = hilbert_path(grid)
    return (t * grid[1] + y) * grid[2] + x


def _axes_order(*axes: int) -> Callable[[Grid], Tensor]:
    """Nested loops over the axes, the first one outermost."""
    return lambda grid: _row_major(grid).permute(axes).flatten()


def _blocked(grid: Grid) -> Tensor:
    edge = 8 if grid[0] == 1 else 4
    t, y, x = (torch.arange(n) // edge for n in grid)
    block = (t[:, None, None] * len(y) + y[:, None]) * len(x) + x
    return block.flatten().argsort(stable=True).int()


def _row_major(grid: Grid) -> Tensor:
    return torch.arange(math.prod(grid), dtype=torch.int32).view(grid)


_CURVES: dict[str, Callable[[Grid], Tensor]] = {
    "hilbert": _hilbert,
    "row-major": _axes_order(0, 1, 2),
    "column-major": _axes_order(0, 2, 1),
    "time-major": _axes_order(1, 2, 0),
    "blocked": _blocked,
}
CURVES = tuple(_CURVES)

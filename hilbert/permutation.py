"""Token orders of a sequence that holds a T × H × W grid, and a bounded cache of them.

The grid's tokens are numbered row by row: token (t, y, x) has index (t * H + y) * W + x. An order lists token indices
in visiting order, so `x[:, order]` sorts tokens along a curve.
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


def sequence_order(grid: Grid, *, before: int = 0, after: int = 0, curve: str = "hilbert",
                   device: torch.device | str = "cpu") -> Tensor:
    """The order of a sequence of `before` other tokens, the tokens of a (T, H, W) grid, and `after` other tokens.

    The grid's tokens come first, so that boxes of the grid fill blocks exactly; text and other tokens follow in their
    own order. `curve` names the order of the grid's tokens:
    - "hilbert": every step goes to a direct neighbour (one coordinate changes by one), whatever the sizes. Where all
      sizes are multiples of 4 (of 8 for a single frame), each run of 64 tokens fills a box, such as 4 × 4 × 4.
    - "row-major": x runs fastest, then y, then t, as the tokens are numbered.
    - "time-major": all frames of a position together: t runs fastest, then x, then y.
    - "blocked": boxes of 4 × 4 × 4 (8 × 8 where T = 1), cut off at the far sides of the grid. Both the boxes and the
      tokens inside a box are in row-major order.

    Returns int32 (before + T·H·W + after,) on `device`, a copy that belongs to the caller. Orders are cached for each
    device, so repeated calls copy nothing between host and device. Raises ValueError for a grid that is not three
    integers ≥ 1, for counts that are not integers ≥ 0, for more tokens than int32 can number, and for an unknown curve.
    """
    if curve not in CURVES:
        raise ValueError(f"curve must be one of {', '.join(CURVES)}, got {curve!r}")
    if not isinstance(grid, (tuple, list)) or len(grid) != 3 or any(type(n) is not int or n < 1 for n in grid):
        raise ValueError(f"grid must be three integers >= 1 (T, H, W), got {grid!r}")
    for name, count in (("before", before), ("after", after)):
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {count!r}")
    frames, height, width = grid
    grid, inside = (frames, height, width), math.prod(grid)
    if inside > _MAX_INDEX:
        raise ValueError(f"grid must have at most {_MAX_INDEX} tokens (indices are int32), got {inside}")
    total = before + inside + after
    if total > _MAX_INDEX:
        raise ValueError(f"before + T*H*W + after must be at most {_MAX_INDEX} (indices are int32), got {total}")
    device = torch.empty(0, device=device).device  # "cuda" means the current one: give it its number

    def build() -> Tensor:
        left, _, right = torch.arange(total, dtype=torch.int32).split([before, inside, after])
        return torch.cat([_grid_order(grid, curve) + before, left, right]).to(device)

    return _cache.get((grid, curve, before, after, device), build).clone()


def free_device_orders() -> None:
    """Drop the copies of cached orders on devices other than the CPU. Later calls copy them there again."""
    _cache.keep_on_host()


class OrderCache:
    """Tensors by key. The least recently used are dropped to keep at most `capacity` elements. Thread-safe.

    Each tensor is built once, on the CPU unless the builder says otherwise. It is an ordinary tensor even in inference
    mode, so that it serves both modes.
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


def _hilbert(grid: Grid) -> Tensor:
    t, y, x = hilbert_path(grid)
    return (t * grid[1] + y) * grid[2] + x


def _row_major(grid: Grid) -> Tensor:
    return torch.arange(math.prod(grid), dtype=torch.int32)


def _time_major(grid: Grid) -> Tensor:
    return _row_major(grid).view(grid).permute(1, 2, 0).flatten()


def _blocked(grid: Grid) -> Tensor:
    edge = 8 if grid[0] == 1 else 4
    t, y, x = (torch.arange(n) // edge for n in grid)
    box = (t[:, None, None] * len(y) + y[:, None]) * len(x) + x
    return box.flatten().argsort(stable=True).int()


_CURVES: dict[str, Callable[[Grid], Tensor]] = {
    "hilbert": _hilbert,
    "row-major": _row_major,
    "time-major": _time_major,
    "blocked": _blocked,
}
CURVES = tuple(_CURVES)

"""A space-filling curve through a grid of any size. Every step goes to a direct neighbour.

The construction is Hilbert's without its powers of two. A box is cut into a chain of smaller boxes. The path enters
each of them at one corner and leaves it at another, which lies next to the corner where it enters the following box.

Parity decides which corners a path can join. A step changes one coordinate by one, so a path through V cells ends at a
Manhattan distance from its start that is odd where V - 1 is odd and even where V - 1 is even. Two different corners of
a box need nothing else: some cut always leads to boxes for which the condition holds again, down to single lines. The
middles of all axes are among the cuts, so once the sizes exceed three, only their remainders modulo four matter. The
tests go through the sizes from 1 to 7, which therefore stand for all. The ends of the whole curve are free, so no size
forces a diagonal step or a jump.

Cuts at multiples of a small cell edge come first, and the curve visits what exceeds the last multiple at the end. Runs
of 64 tokens therefore fill a box exactly wherever the grid allows it, instead of straddling two.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Triple = tuple[int, ...]  # three coordinates or sizes, (t, y, x), or a flag for each axis
Box = tuple[tuple[int, int], ...]  # (first, end) along each axis
Leg = tuple[Box, Triple, Triple]  # a box and the corners at which the path enters and leaves it
_ORIGIN = (0, 0, 0)


def hilbert_path(dims: Triple) -> Tensor:
    """The curve through a grid of `dims` tokens: their coordinates in visiting order, int32 (3, tokens)."""
    edge = _cell_edge(dims)
    core = [n - n % edge if n > edge else n for n in dims]
    # The core, then the remainder along each axis: it spans the whole of the axes before it and the core of the rest.
    boxes: list[Box] = [tuple((0, m) for m in core)]
    boxes += [(*((0, n) for n in dims[:a]), (core[a], dims[a]), *((0, m) for m in core[a + 1:])) for a in range(3)]
    boxes = _not_empty(boxes)
    chains = (_chain(boxes, enter) for enter in _corners(boxes[0]))
    return _Paths().join(next(filter(None, chains)))


class _Paths:
    """The paths through boxes. Each is built once for its sizes and ends, wherever a box lies and however it turns."""

    def __init__(self):
        self._built: dict[tuple[Triple, Triple], Tensor] = {}

    def join(self, legs: list[Leg]) -> Tensor:
        paths = []
        for box, enter, leave in legs:
            path = self._path(_sizes(box), tuple(int(x != y) for x, y in zip(enter, leave)))
            direction = [1 if x == first else -1 for x, (first, _) in zip(enter, box)]
            paths.append(torch.addcmul(_column(enter), path, _column(direction)))
        return torch.cat(paths, 1)

    def _path(self, dims: Triple, flips: Triple) -> Tensor:
        """The path from the origin to the corner that lies opposite to it along the axes whose flip is 1."""
        axes = sorted(range(3), key=lambda a: (dims[a], flips[a]))
        key = tuple(dims[a] for a in axes), tuple(flips[a] for a in axes)
        if key not in self._built:
            self._built[key] = self._build(*key)
        return self._built[key][[axes.index(a) for a in range(3)]]

    def _build(self, dims: Triple, flips: Triple) -> Tensor:
        if dims[1] == 1:  # a line, because the sizes ascend
            return torch.arange(dims[2], dtype=torch.int32) * _column(dims).gt(1)
        return self.join(_plan(dims, flips))


@functools.lru_cache(1024)
def _plan(dims: Triple, flips: Triple) -> list[Leg]:
    """The legs through smaller boxes that make the path through a box."""
    leave = tuple((n - 1) * flip for n, flip in zip(dims, flips))
    chains = (_chain(boxes, _ORIGIN, leave) for boxes in _splits(dims, flips))
    return next(filter(None, chains))


def _splits(dims: Triple, flips: Triple) -> Iterator[list[Box]]:
    """Ways to cut a box into two to five boxes in the order of the path. The most compact ways come first.

    Cuts along three axes give the five boxes of Hilbert's cube, whose second, third and fourth are pairs of octants.
    Cuts along a and b give the four quarters of his square, and a cut along a alone gives two halves. The path goes out
    along b and c and comes back, so only axes without a flip may take their places.
    """
    edge = _cell_edge(dims)
    ranked = []
    for axes in itertools.permutations(range(3)):
        na, nb, nc = sizes = tuple(dims[axis] for axis in axes)
        if not flips[axes[0]]:
            continue
        beside = ([dims[axis]] if flips[axis] else [dims[axis], *_cuts(dims[axis], edge)] for axis in axes[1:])
        for i, j, k in itertools.product(_cuts(na, edge), *beside):
            # Inside a cell any cut will do. A larger box is best cut between cells.
            through_cells = max(dims) > edge and sum(cut < n and cut % edge > 0 for cut, n in zip((i, j, k), sizes))
            parts = (i, j, k), (i, nb - j, nc), (na, j, nc - k), (na - i, nb - j, nc), (na - i, j, k)
            ranked.append((through_cells, sum(map(_elongation, parts)), axes, (i, j, k)))
    for *_, (a, b, c), (i, j, k) in sorted(ranked, key=lambda split: split[:2]):
        na, nb, nc = dims[a], dims[b], dims[c]
        spans = [
            {a: (0, i), b: (0, j), c: (0, k)},
            {a: (0, i), b: (j, nb), c: (0, nc)},
            {a: (0, na), b: (0, j), c: (k, nc)},
            {a: (i, na), b: (j, nb), c: (0, nc)},
            {a: (i, na), b: (0, j), c: (0, k)},
        ]
        yield _not_empty((span[0], span[1], span[2]) for span in spans)


def _chain(boxes: list[Box], enter: Triple, leave: Triple | None = None) -> list[Leg] | None:
    """Legs through the boxes from the corner `enter` to `leave`, or to any corner; None if there is no such chain."""
    box, *rest = boxes
    steps = math.prod(_sizes(box)) - 1

    def reach(corner: Triple) -> tuple[int, int]:
        return sum(x != y for x, y in zip(enter, corner)), -_distance(enter, corner)

    # Ends along an edge come first, the longest edge before the others: they leave the most compact cuts open.
    for corner in sorted(_corners(box), key=reach):
        distance = _distance(enter, corner)
        if (steps - distance) % 2 or (steps > 0 and distance == 0):
            continue
        if not rest:
            if leave in (None, corner):
                return [(box, enter, corner)]
            continue
        for following in _corners(rest[0]):
            if _distance(corner, following) == 1 and (legs := _chain(rest, following, leave)):
                return [(box, enter, corner), *legs]
    return None


def _cell_edge(dims: Triple) -> int:
    """Edge of the cells that cuts keep whole: 4 × 4 × 4 tokens fill a block of 64, as do 8 × 8 in a single frame."""
    return 4 if min(dims) > 2 else 8


def _cuts(n: int, edge: int) -> list[int]:
    """The multiple of `edge` that is nearest to the middle, and the middle."""
    return [cut for cut in sorted({max(1, round(n / 2 / edge)) * edge, n // 2}) if 0 < cut < n]


def _elongation(sizes: Triple) -> float:
    """How far a box is from a cube, weighted by its volume."""
    volume = math.prod(sizes)
    return volume * max(sizes) / min(sizes) if volume else 0.0


def _not_empty(boxes: Iterable[Box]) -> list[Box]:
    return [box for box in boxes if math.prod(_sizes(box))]


def _sizes(box: Box) -> Triple:
    return tuple([end - first for first, end in box])


def _corners(box: Box) -> list[Triple]:
    return list(itertools.product(*(sorted({first, end - 1}) for first, end in box)))


def _distance(x: Triple, y: Triple) -> int:
    return sum(abs(p - q) for p, q in zip(x, y))


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)[:, None]

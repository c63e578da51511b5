"""A space-filling curve through a grid of any size, all of whose steps go to a direct neighbour.

Hilbert's construction without its powers of two: a box is cut into a chain of smaller boxes, and the path enters each
of them at a corner and leaves it at another one, next to the corner at which it enters the following box.

Which corners a path can join is a matter of parity. A step changes one coordinate by one, so a path of V - 1 steps ends
at a Manhattan distance from its start that is even where V - 1 is even, and odd where it is odd. For the corners of a
box this is all that is asked, except that they differ where V > 1: some cut leads to boxes for which it holds again,
down to single lines. The middles of all axes are among the cuts, so whether one fits depends on nothing but the sizes
modulo four once they exceed three, and the sizes from 1 to 7, which the tests go through, stand for all. The ends of
the whole curve are free, so that no size forces a diagonal step or a jump.

Cuts at multiples of a small edge come first, and what exceeds the last multiple is visited at the end, so that runs of
64 tokens fill a box exactly, instead of straddling two, wherever the grid allows it.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Cell = tuple[int, int, int]
Box = tuple[tuple[int, int], ...]  # (first, end) along each axis
Leg = tuple[Box, Cell, Cell]  # a box and the corners at which the path enters and leaves it
_ORIGIN = (0, 0, 0)


def hilbert_path(dims: Cell) -> Tensor:
    """The curve through a grid of `dims` cells: their coordinates in visiting order, int32 (3, cells)."""
    edge = _edge(dims)
    core = [n - n % edge if n > edge else n for n in dims]
    # The core, then the remainder along each axis: it spans the whole of the axes before it and the core of the rest.
    boxes = [tuple((0, m) for m in core)]
    boxes += [(*((0, n) for n in dims[:a]), (core[a], dims[a]), *((0, m) for m in core[a + 1:])) for a in range(3)]
    boxes = _filled(boxes)
    chains = (_thread(boxes, enter) for enter in _corners(boxes[0]))
    return _Paths().join(next(filter(None, chains)))


class _Paths:
    """The paths through boxes, each built once for its sizes and ends, wherever it lies and however it is turned."""

    def __init__(self):
        self._built: dict[tuple[Cell, Cell], Tensor] = {}

    def join(self, legs: list[Leg]) -> Tensor:
        paths = []
        for box, enter, leave in legs:
            path = self._path(_sizes(box), tuple(int(x != y) for x, y in zip(enter, leave)))
            direction = [1 if x == first else -1 for x, (first, _) in zip(enter, box)]
            paths.append(torch.addcmul(_column(enter), path, _column(direction)))
        return torch.cat(paths, 1)

    def _path(self, dims: Cell, flips: Cell) -> Tensor:
        """The path from the origin to the corner opposite to it along the axes with a flip of 1."""
        axes = sorted(range(3), key=lambda a: (dims[a], flips[a]))
        key = tuple(dims[a] for a in axes), tuple(flips[a] for a in axes)
        if key not in self._built:
            self._built[key] = self._build(*key)
        return self._built[key][[axes.index(a) for a in range(3)]]

    def _build(self, dims: Cell, flips: Cell) -> Tensor:
        if dims[1] == 1:  # a line: the sizes ascend
            return torch.arange(dims[2], dtype=torch.int32) * _column(dims).gt(1)
        return self.join(_plan(dims, flips))


@functools.lru_cache(1024)
def _plan(dims: Cell, flips: Cell) -> list[Leg]:
    """How the path through a box is made of paths through smaller ones."""
    leave = tuple((n - 1) * flip for n, flip in zip(dims, flips))
    chains = (_thread(boxes, _ORIGIN, leave) for boxes in _splits(dims, flips))
    return next(filter(None, chains))


def _splits(dims: Cell, flips: Cell) -> Iterator[list[Box]]:
    """Ways to cut a box in two to five, in the order of the path, the most compact ones first.

    Cuts along three axes give the five boxes of Hilbert's cube, whose second, third and fourth are pairs of octants; a
    cut along a and b gives the four quarters of his square, a cut along a alone two halves. The path goes out along b
    and c and comes back, so only axes without a flip may take their places.
    """
    edge = _edge(dims)
    ranked = []
    for axes in itertools.permutations(range(3)):
        na, nb, nc = sizes = tuple(dims[axis] for axis in axes)
        if not flips[axes[0]]:
            continue
        beside = ([dims[axis]] if flips[axis] else [dims[axis], *_cuts(dims[axis], edge)] for axis in axes[1:])
        for i, j, k in itertools.product(_cuts(na, edge), *beside):
            # Inside a cell any cut will do; a larger box is best cut between cells.
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
        yield _filled((span[0], span[1], span[2]) for span in spans)


def _thread(boxes: list[Box], enter: Cell, leave: Cell | None = None) -> list[Leg] | None:
    """A chain of legs through the boxes from one corner to another, or to any, or None if there is none."""
    box, *rest = boxes
    steps = math.prod(_sizes(box)) - 1

    def reach(corner: Cell) -> tuple[int, int]:
        return sum(x != y for x, y in zip(enter, corner)), -_distance(enter, corner)

    # Along an edge first, and along the longest: from there the most compact cuts are open.
    for corner in sorted(_corners(box), key=reach):
        distance = _distance(enter, corner)
        if (steps - distance) % 2 or (steps > 0 and distance == 0):
            continue
        if not rest:
            if leave in (None, corner):
                return [(box, enter, corner)]
            continue
        for following in _corners(rest[0]):
            if _distance(corner, following) == 1 and (legs := _thread(rest, following, leave)):
                return [(box, enter, corner), *legs]
    return None


def _edge(dims: Cell) -> int:
    """Edge of the cells: 4 × 4 × 4 tokens fill a block of 64, as do 8 × 8 in a single frame."""
    return 4 if min(dims) > 2 else 8


def _cuts(n: int, edge: int) -> list[int]:
    """The multiple of `edge` nearest to the middle, and the middle."""
    return [cut for cut in sorted({max(1, round(n / 2 / edge)) * edge, n // 2}) if 0 < cut < n]


def _elongation(sizes: Cell) -> float:
    """How far a box is from a cube, weighted with its cells."""
    cells = math.prod(sizes)
    return cells * max(sizes) / min(sizes) if cells else 0.0


def _filled(boxes: Iterable[Box]) -> list[Box]:
    return [box for box in boxes if math.prod(_sizes(box))]


def _sizes(box: Box) -> Cell:
    return tuple([end - first for first, end in box])


def _corners(box: Box) -> list[Cell]:
    return list(itertools.product(*(sorted({first, end - 1}) for first, end in box)))


def _distance(x: Cell, y: Cell) -> int:
    return sum(abs(p - q) for p, q in zip(x, y))


def _column(values: Cell) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)[:, None]

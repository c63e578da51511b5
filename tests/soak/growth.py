"""Find out whether a process holds more and more."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

WINDOWS = 10


def medians(values: Sequence[float]) -> list[float]:
    """The medians of `WINDOWS` windows of equal length, in order."""
    bounds = [len(values) * i // WINDOWS for i in range(WINDOWS + 1)]
    return [median(values[start:stop]) for start, stop in zip(bounds, bounds[1:])]


def slope(values: Sequence[float]) -> float:
    """Growth from one value to the next: the median slope between any two windows' medians (Theil and Sen).

    Neither a large prompt nor a single step of the allocator moves it far; a leak in every prompt does.
    """
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(medians(values)), 2)]
    return median(slopes) * WINDOWS / len(values)

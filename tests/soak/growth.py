"""What a process holds over time, and whether that grows."""
from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import median

import psutil

WINDOWS = 10


@dataclass(frozen=True)
class Sample:
    """memory: resident, in bytes. files: open file descriptors, sockets among them."""

    memory: int
    threads: int
    files: int

    @classmethod
    def of(cls, process: psutil.Process) -> Sample:
        with process.oneshot():
            files = process.num_handles() if psutil.WINDOWS else process.num_fds()
            return cls(process.memory_info().rss, process.num_threads(), files)


def medians(values: list[int]) -> list[float]:
    """Of `WINDOWS` windows of equal length, in order."""
    bounds = [len(values) * i // WINDOWS for i in range(WINDOWS + 1)]
    return [median(values[start:stop]) for start, stop in zip(bounds, bounds[1:])]


def slope(values: list[int]) -> float:
    """Growth from one value to the next: the median slope between any two windows' medians (Theil and Sen).

    Neither a single large prompt nor a single step, such as the allocator's, moves it; a leak in every prompt does.
    """
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(medians(values)), 2)]
    return median(slopes) * WINDOWS / len(values)

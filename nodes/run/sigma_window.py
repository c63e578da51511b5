"""The part of the sampling between start_percent and end_percent, followed without waiting for the device."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

# Schedulers compute in float32 and percent_to_sigma in float64: step n of N has to lie at n / N all the same.
_TOLERANCE = 1e-5


def sigma_range(start_percent: float, end_percent: float,
                percent_to_sigma: Callable[[float], float]) -> tuple[float, float]:
    """(lowest, highest) noise level between two percentages of the sampling; infinite where a percentage is no bound.

    percent_to_sigma: of the model's sampling; it falls.
    """
    lowest = float(percent_to_sigma(end_percent)) * (1 - _TOLERANCE) if end_percent < 1 else -math.inf
    highest = float(percent_to_sigma(start_percent)) * (1 + _TOLERANCE) if start_percent > 0 else math.inf
    return lowest, highest


class SigmaWindow:
    """Tells for each model evaluation whether its noise level lies between the two percentages, both included.

    The noise level usually lives on the GPU, and reading it waits for everything queued there. It is read only where
    the answer is open. The n-th evaluation of a falling schedule is not beyond the n-th step, which settles the
    evaluations before the window. Once inside a falling schedule, only an `end_percent` below 1 can end the window.
    """

    def __init__(self, start_percent: float, end_percent: float):
        self.percents = start_percent, end_percent
        self.bounded = start_percent > 0 or end_percent < 1
        self.reset()

    def reset(self) -> None:
        """End of a run. Without a run nothing tells the noise level, and only a window without bounds includes it."""
        self.inside = not self.bounded
        self.lowest, self.highest = -math.inf, math.inf  # noise levels inside
        self._schedule: Sequence[float] = ()
        self._falls = False
        self._evaluations = 0

    def begin(self, percent_to_sigma: Callable[[float], float], schedule: Sequence[float]) -> None:
        """Start a run. percent_to_sigma: of the model's sampling. schedule: noise levels of the run, in order."""
        self.reset()
        self.lowest, self.highest = sigma_range(*self.percents, percent_to_sigma)
        self._schedule = schedule
        self._falls = all(a >= b for a, b in pairwise(schedule))

    def advance(self, read_sigma: Callable[[], float]) -> None:
        """Go to the next evaluation of the model; `read_sigma` returns its noise level."""
        if self.bounded and not self._settled():
            self.inside = self.lowest <= read_sigma() <= self.highest
        self._evaluations += 1

    def _settled(self) -> bool:
        """Whether `inside` is sure to hold for this evaluation too."""
        if not self._falls:
            return False
        if self.inside:
            return self.lowest == -math.inf
        return self._evaluations < len(self._schedule) and self._schedule[self._evaluations] > self.highest

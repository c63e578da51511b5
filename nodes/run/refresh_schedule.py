"""Which evaluations of the model compute dense attention again, so that those between can add what they lack of it."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from .sampler_noise import adds_noise

# Steps that may go sparse. Fewer lie far apart: residuals fit them less, and the dense steps among them cost more time
# than they are worth. That was measured with 6 and with 16 (tests/bench/README.md, "Refreshes"). Schedulers leave 14 to
# 16 of 20 steps.
FEWEST = 12
# Difference of the logarithm of signal over noise at which two residuals have nothing in common any more. Below it,
# the square of what separates them grows in proportion.
_UNRELATED = 4.0
# Residuals move on along a line for a while: of the way to the middle of the steps that one serves, so much is gone.
# Over a larger difference of that logarithm a line only adds noise.
_LEAD = 0.7
_LINE = 0.6
_ALIKE = 1e-4  # relative; schedulers and samplers round the same noise level differently
_TRIED = 4  # evaluations after which a sampler that took one for each step so far is taken to go on so


def refresh_steps(noise: Sequence[float], count: int, first: int = 0) -> list[int]:
    """The steps to refresh at: `count` of those from `first` on, with `first` itself.

    A step uses the residual of the last refresh, and what that costs grows with the distance of their noise levels. The
    sum over all steps is as small as it can be. All steps count the same: a schedule spends them where they matter, and
    an error of attention was found to change the clip about as much in one step as in another.

    noise: share of noise in the sample, from 1 to 0, at each step and at the end; it falls.
    """
    # Pure noise is infinitely far from any other level; what the first step covers is not.
    noise = [level if level < 1 else (1 + following) / 2 for level, following in pairwise(noise)]
    snr = torch.tensor([_log_snr(level) for level in noise[first:]], dtype=torch.float64, device="cpu")
    apart = ((snr[:, None] - snr).abs() / _UNRELATED).clamp(max=1)
    # serves[s, e]: cost of steps s to e - 1 with the residual of step s
    steps = len(snr)
    serves = torch.full((steps, steps + 1), math.inf, dtype=torch.float64, device="cpu")
    serves[:, 1:] = apart.triu().cumsum(1)
    serves.masked_fill_(torch.ones_like(serves, dtype=torch.bool).tril(), math.inf)
    best, choices = serves[0], []
    for _ in range(min(count, steps) - 1):
        best, choice = (best[:-1, None] + serves).min(0)
        choices.append(choice)
    last, chosen = steps, []
    for choice in reversed(choices):
        last = int(choice[last])
        chosen.append(last)
    return [first, *(first + step for step in reversed(chosen))]


def leads(noise: Sequence[float], refreshed: Sequence[int]) -> list[float]:
    """How far beyond each refresh its residual is to be extrapolated, as a share of the distance from the refresh
    before: to the middle of the steps that it serves, less what such a line is known to overshoot. Zero for the first,
    and where that middle is too far away.

    noise: as of `refresh_steps`. refreshed: the steps that refresh.
    """
    found = [0.0]
    for before, step, following in zip(refreshed, refreshed[1:], [*refreshed[2:], len(noise) - 1]):
        served = noise[step + 1:following]
        middle = sum(served) / len(served) if served else noise[step]
        near = _log_snr(middle) - _log_snr(noise[step]) <= _LINE
        found.append(_LEAD * (middle - noise[step]) / (noise[step] - noise[before]) if near else 0.0)
    return found


def _log_snr(level: float) -> float:
    """The logarithm of signal over noise at a share of noise."""
    level = min(max(level, 1e-9), 1 - 1e-9)
    return math.log((1 - level) / level)


class RefreshSchedule:
    """Follows a run and tells for each evaluation of the model whether it refreshes the residuals.

    Refreshes are chosen from the sampler's schedule before the run, and are due when the noise has fallen to their
    level, however many evaluations a step takes. Reading a noise level waits for the device. So it is read at the first
    evaluations, and then only with samplers that don't take one evaluation a step.

    due: whether this evaluation refreshes.
    serves: whether it also makes residuals; at the last step none would be used.
    lead: how far the residuals that this evaluation makes are to be extrapolated, see `leads`.
    levels: noise levels of the refreshes of this run; none where there are none.
    problem: why there are none although `count` asks for some.
    steady: whether the sampler of this run adds no noise between steps; set before `begin`.
    """

    def __init__(self, count: int):
        """count: refreshes among the evaluations that may go sparse. The last evaluation before them is one too, at no
        cost, because it is dense in any case."""
        self.count = count
        self.steady = True
        self.reset()

    def reset(self) -> None:
        """End of a run."""
        self.due = False
        self.lead = 0.0
        self.levels: tuple[float, ...] = ()
        self.problem = ""
        self._pending: list[tuple[float, float]] = []  # (level, lead)
        self._schedule: Sequence[float] = ()
        self._evaluations = 0
        self._one_a_step = True

    def on_sampler(self, executor: Callable, *args, **kwargs) -> Any:
        """Wrapper of ComfyUI's SAMPLER_SAMPLE: which sampler evaluates the model in this run."""
        self.steady = not adds_noise(getattr(executor, "class_obj", None))
        return executor(*args, **kwargs)

    def begin(self, schedule: Sequence[float], lowest: float, highest: float, largest: float) -> None:
        """Start a run.

        schedule: noise levels of the run, in order, with the one that it ends at.
        lowest, highest: noise levels that may go sparse.
        largest: noise level at which the model's sampling starts, 1 for flow models.
        """
        self.reset()
        if not self.count:
            return
        if not self.steady:
            self.problem = "the sampler adds noise between steps"
            return
        if len(schedule) < 2 or any(a <= b for a, b in pairwise(schedule)):
            self.problem = "the sampler gave no falling noise levels"
            return
        inside = [step for step, level in enumerate(schedule[:-1]) if lowest <= level <= highest]
        if len(inside) < FEWEST:
            self.problem = f"{len(inside)} steps may go sparse, and it takes {FEWEST}"
            return
        before = inside[0] > 0
        noise = [level if largest <= 1 else level / (1 + level) for level in schedule[:inside[-1] + 2]]
        chosen = refresh_steps(noise, min(self.count, len(inside) // 2) + before, inside[0] - before)
        self._schedule = schedule
        self.levels = tuple(schedule[step] for step in chosen)
        self._pending = list(zip(self.levels, leads(noise, chosen)))

    @property
    def serves(self) -> bool:
        if not self.due:
            return False
        *_, last, end = self._schedule
        return bool(self._pending) or self.levels[-1] > last or end > 0

    @property
    def ahead(self) -> bool:
        """Whether the first refresh is still to come."""
        return len(self._pending) == len(self.levels) > 0

    def give_up(self, problem: str) -> None:
        """Have no refreshes in this run."""
        self.due, self.levels, self.problem = False, (), problem
        self._pending = []

    def advance(self, read_sigma: Callable[[], float]) -> None:
        """Go to the next evaluation of the model; `read_sigma` returns its noise level."""
        self.due = False
        if self._pending:
            sigma = self._level(read_sigma)
            while self._pending and sigma <= self._pending[0][0] * (1 + _ALIKE):
                _, lead = self._pending.pop(0)
                self.lead = 0.0 if self.due else lead  # a refresh that was passed over made no residual to start from
                self.due = True
        self._evaluations += 1

    def _level(self, read_sigma: Callable[[], float]) -> float:
        step = self._evaluations
        if self._one_a_step and _TRIED <= step < len(self._schedule):
            return self._schedule[step]
        sigma = read_sigma()
        expected = self._schedule[step] if step < len(self._schedule) else math.inf
        self._one_a_step = self._one_a_step and math.isclose(sigma, expected, rel_tol=_ALIKE)
        return sigma

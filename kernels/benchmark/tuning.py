"""Looks for a launch configuration that is faster than the table's on this device, with the same results."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from .._triton import measured
from .._triton.config import AttendConfig
from .._triton.measured_file import Launch, Measured
from ..call import CallSpec, Thresholds
from ..capability import card_name
from ..failures import FastPathError
from ..types import SpargeParams
from .candidates import neighbours
from .clock import Clock, median_ms
from .result import MARGIN, Result, Tried, problem_of

SHARE = 0.5  # of the blocks, in the calls that are timed
_HOPELESS = 1.5  # times the table's time: not worth a second look
_FINALISTS = 3
_PAIRS = 5, 15  # of calls, by the table's configuration and by another in turns
_IN_PAIRS = 1500.0  # milliseconds that these take together
_AGREE = 0.02  # relative L1 of the outputs of two configurations, which differ in the order of sums and in rounding


class Tuner:
    """Tries the configurations around the table's on q, k and v (B, H, N, D), which the fast kernels take.

    tick: is called before each call of the device, with the share of the work that is done and what is being done; may
    raise to end it. deadlines: by `clock.seconds()`, after which no more configurations are tried, and after which no
    more than one of these is compared with the table's.
    """

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor], pv_dtype: str, clock: Clock,
                 tick: Callable[[float, str], None], deadlines: tuple[float, float]):
        from .._triton import pipeline  # imports Triton
        self._attention = pipeline.attention
        self._qkv, self._pv_dtype, self._clock, self._tick, self._deadlines = qkv, pv_dtype, clock, tick, deadlines

    def run(self, result: Result) -> tuple[tuple, Measured | None]:
        """`Measured.key` of these calls, and the fastest configuration if it is faster than the table's by more than
        noise. Fills `result` with all that was tried.

        Skips configurations that do not compile, start or fit, and those with other results than the table's.
        """
        with measured.trial() as trial:
            self._say(0.0, "the pack's own launch configuration")
            expected = self._attend()
            entry = trial.entry
            assert entry is not None  # the call left it there
            key = (card_name(expected.device), measured.triton_name(), trial.padded_dim, trial.pv_format)
            result.pv_format = trial.pv_format
            table_ms = median_ms(self._clock, self._attend, self._again)
            result.tried.append(Tried(entry, table_ms))
            candidates = neighbours(entry)
            for i, config in enumerate(candidates):
                if self._clock.seconds() > self._deadlines[0]:
                    left = f"{len(candidates) - i} of {len(candidates)} launch configurations"
                    result.notes.append(f"Time was up, and {left} were not tried. A second benchmark gets further, "
                                        "because the kernels are compiled.")
                    break
                self._say((i + 1) / (len(candidates) + 2), Tried(config).name)
                trial.config = config
                result.tried.append(self._try(config, expected, table_ms))
            del expected
            for i, config in enumerate(_fastest(result.tried[1:], table_ms)):
                if i and self._clock.seconds() > self._deadlines[1]:
                    break
                self._say(1 - 1 / (len(candidates) + 2), f"{Tried(config).name}, once more")
                gain = self._gain(trial, config)
                if gain is not None:
                    result.faster, result.gain = config, gain
                    return key, Measured(*key, entry.block.q, entry.block.k, Launch.of(entry), Launch.of(config), gain)
            return key, None

    def _try(self, config: AttendConfig, expected: Tensor, table_ms: float) -> Tried:
        try:
            self._again()
            if not difference(expected, self._attend()) <= _AGREE:
                return Tried(config, problem="its result is wrong")
            self._again()
            first = self._clock.ms(self._attend)
            return Tried(config, first if first > _HOPELESS * table_ms else
                         median_ms(self._clock, self._attend, self._again))
        except (FastPathError, torch.OutOfMemoryError) as error:
            return Tried(config, problem=problem_of(error))

    def _gain(self, trial: measured.Trial, config: AttendConfig) -> float | None:
        """The table's time in units of the configuration's, the least of several kernels; None where it is no gain, or
        where the configuration does not serve a kernel or gives other results."""
        gains = []
        try:
            # The kernel with the λ test is checked and not timed.
            for skipped, pv_threshold in (("pooled", 20.0), ("drop", math.inf), ("pooled", math.inf)):
                attend = partial(self._attend, skipped, pv_threshold)
                outputs = []
                for trial.config in (None, config):
                    self._again()
                    outputs.append(attend())
                if not difference(*outputs) <= _AGREE:
                    return None
                del outputs
                if pv_threshold == math.inf:
                    gain = self._in_turns(trial, config, attend)
                    if gain is None:
                        return None
                    gains.append(gain)
        except (FastPathError, torch.OutOfMemoryError):
            return None
        return min(gains)

    def _in_turns(self, trial: measured.Trial, config: AttendConfig, run: Callable[[], object]) -> float | None:
        """The median ratio of calls that follow each other; None where it is within the noise of the table's times."""
        ratios, times = [], []
        while len(ratios) < _PAIRS[0] or (len(ratios) < _PAIRS[1] and sum(times) < _IN_PAIRS):
            pair = []
            for trial.config in (None, config):
                self._again()
                pair.append(self._clock.ms(run))
            times.append(pair[0])
            ratios.append(pair[0] / pair[1])
        low, middle, high = statistics.quantiles(times, n=4)
        gain = statistics.median(ratios)
        return gain if gain > max(MARGIN, 1 + (high - low) / middle) else None

    def _attend(self, skipped: str = "pooled", pv_threshold: float = math.inf) -> Tensor:
        """As the presets of Apply SpargeAttn have it, with skipped blocks pooled. Goes past what `dispatch` does where
        kernels fail: that a configuration does not fit is no reason to switch them off."""
        q, k, v = self._qkv
        params = SpargeParams(topk=SHARE, similarity_threshold=-1.0, pv_threshold=pv_threshold)
        out = torch.empty_like(q)
        self._attention(q, k, v, out, None, CallSpec(Thresholds.of(params, q.device), pv_dtype=self._pv_dtype,
                                                     skipped=skipped))
        return out

    def _say(self, share: float, doing: str) -> None:
        self._now = share, doing
        self._again()

    def _again(self) -> None:
        self._tick(*self._now)


def _fastest(tried: Iterable[Tried], table_ms: float) -> list[AttendConfig]:
    """Those that look faster than the table's, the fastest first."""
    faster = sorted((row.ms, i, row.config) for i, row in enumerate(tried)
                    if row.ms is not None and row.ms * MARGIN < table_ms)
    return [config for _, _, config in faster[:_FINALISTS]]


def difference(expected: Tensor, out: Tensor) -> float:
    """Relative L1 of (B, H, N, D), NaN where one of them has a NaN. Head by head: a copy in float32 is large."""
    off = total = torch.zeros((), device=out.device)
    for batch in range(len(out)):
        for head in range(out.shape[1]):
            wanted = expected[batch, head].float()
            off = off + (out[batch, head].float() - wanted).abs().sum()
            total = total + wanted.abs().sum()
    return (off / total).item()

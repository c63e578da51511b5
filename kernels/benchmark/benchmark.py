"""Times dense and sparse attention of one shape on one device, and launch configurations beside the table's."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .._triton import measured
from ..api import sparge_attention
from ..capability import select_implementation
from ..failures import FastPathError, is_of_the_device
from ..types import SpargeParams
from .clock import Clock, median_ms
from .machine import machine
from .result import Result, Timed, name_of, problem_of
from .shapes import Shape, inputs
from .tuning import Tuner, difference

SECONDS = 80.0
SHARES = 0.5, 0.3, 0.1
_DEADLINES = 0.6, 0.8  # shares of the time, for `Tuner`
_LONGEST = 1000.0  # milliseconds of a dense call
_RIGHT = 0.1  # relative L1 to dense attention with every block kept: more is no rounding


@dataclass
class Job:
    """What is to be timed.

    dense: attention of q, k and v (B, H, N, D) → (B, H, N, D); dense_name: what it is called.
    free: bytes of the device's memory that may be taken, None for as many as the shape needs.
    pv_dtype: as of `sparge_attention`.
    tune: whether launch configurations are tried, and the fastest taken from then on. file: keeps it for later
    processes. seconds: what it may take; where they are short, fewer configurations are tried.
    """

    shape: Shape
    device: torch.device
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    dense_name: str
    free: float | None = None
    pv_dtype: str = "auto"
    tune: bool = True
    file: Path | None = None
    seconds: float = SECONDS


def run(job: Job, progress: Callable[[float, str], None] = lambda share, doing: None,
        clock: Clock | None = None) -> Result:
    """
    progress: is called before every call of the device, with the share that is done and what is being done; what it
    raises ends the benchmark. Raises RuntimeError where the device is broken.
    """
    return _Run(job, progress, clock or Clock(job.device)).result


class _Run:
    """A benchmark, from its beginning to its end."""

    def __init__(self, job: Job, progress: Callable[[float, str], None], clock: Clock):
        self._job, self._progress, self._clock, self._began = job, progress, clock, clock.seconds()
        dtype = torch.float32 if job.device.type == "cpu" else torch.bfloat16
        example = torch.empty(1, 1, 1, job.shape.head_dim, dtype=dtype, device=job.device)
        reason = select_implementation(example)[1]
        self._fast = reason is None
        shape = job.shape.within(job.free) if self._fast and job.free is not None else job.shape
        self.result = Result(shape if self._fast else shape.for_a_cpu(), dtype, machine(job.device), self._fast)
        if reason is not None:
            self.result.notes.append(f"There is nothing to tune: {reason}. These are times of the slow reference, for "
                                     "a small part of the shape.")
        elif shape != job.shape:
            self._note_part("Memory has room for some of the heads")
        progress(0.0, "inputs")
        self._qkv = inputs(self.result.shape, job.device, dtype)
        if self._fast:
            self._shorten()
        if self._compare():
            if job.tune and self._fast:
                self._tune()
            for i, share in enumerate(SHARES):
                self.result.ours.append(self._timed(0.85 + 0.05 * i, name_of(share), partial(self._ours, share))[0])
        progress(1.0, "done")

    def _dense(self) -> Tensor:
        return self._job.dense(*self._qkv)

    def _ours(self, share: float) -> Tensor:
        q, k, v = self._qkv
        out = sparge_attention(q, k, v, params=SpargeParams(topk=share, similarity_threshold=-1.0),
                               pv_dtype=self._job.pv_dtype, impl="triton" if self._fast else "reference")
        assert isinstance(out, Tensor)  # nothing else was asked for
        return out

    def _shorten(self) -> None:
        """Leave heads out where a call of all takes long: one head fills a GPU with blocks of so many tokens."""
        shape, (q, k, v) = self.result.shape, self._qkv
        first = self._timed(0.01, self._job.dense_name, lambda: self._job.dense(q[:1, :1], k[:1, :1], v[:1, :1]))[0].ms
        heads = max(1, int(_LONGEST / first / shape.batch)) if first else shape.heads
        if heads < shape.heads:
            self.result.shape = replace(shape, heads=heads)
            self._qkv = q[:, :heads].contiguous(), k[:, :heads].contiguous(), v[:, :heads].contiguous()
            self._note_part("All heads take long here")

    def _note_part(self, why: str) -> None:
        self.result.notes.append(f"{why}, so a part was timed: {self._job.shape} is all of it.")

    def _compare(self) -> bool:
        """Time dense attention and ours with all blocks. Whether ours can be computed, and is right."""
        self.result.dense, expected = self._timed(0.02, self._job.dense_name, self._dense)
        row, out = self._timed(0.1, name_of(1), partial(self._ours, 1.0))
        if expected is not None and out is not None:
            error = difference(expected, out)
            row = (replace(row, error=error) if error <= _RIGHT else
                   Timed(row.name, problem="its result is wrong, please report it", error=error))
        self.result.ours.append(row)
        return row.ms is not None

    def _tune(self) -> None:
        tries, finalists = (self._began + share * self._job.seconds for share in _DEADLINES)
        tuner = Tuner(self._qkv, self._job.pv_dtype, self._clock, lambda share, doing: self._progress(
            0.15 + 0.7 * share, doing), (tries, finalists))
        try:
            key, found = tuner.run(self.result)
        except (FastPathError, torch.OutOfMemoryError) as problem:
            self.result.notes.append(f"Launch configurations could not be tried: {problem_of(problem)}.")
            return
        try:
            measured.keep(self._job.file, key, found)
        except OSError as problem:
            self.result.notes.append(f"The launch configuration could not be kept for later runs: {problem}.")

    def _timed(self, share: float, name: str, attend: Callable[[], Tensor]) -> tuple[Timed, Tensor | None]:
        """The time of a call and its output. share: of the work that is done."""
        tick = partial(self._progress, share, name)
        tick()
        try:
            out = attend()
            return Timed(name, median_ms(self._clock, attend, tick)), out
        except Exception as error:  # dense attention is anybody's, and ours may not compile
            if is_of_the_device(error):
                raise
            return Timed(name, problem=problem_of(error)), None

"""One sampling run of a patched model: where it is, and what became of its attention calls."""
from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable

from torch import Tensor

from ..kernels import SpargeStats
from .blocks import Block
from .policy import Dense
from .run_summary import RunSummary, SparseCall
from .sigma_window import SigmaWindow

log = logging.getLogger("comfyui_spargeattn")


class RunState:
    """What a run collects; several threads may add to it. It holds tensors only between `begin` and `end`."""

    def __init__(self, window: SigmaWindow):
        self.window = window
        self.summary: RunSummary | None = None  # of the last run that ended
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.running = False
        self.steps = 0
        self._timestep: Tensor | None = None
        self._calls: list[SparseCall] = []
        self._dense: Counter[str] = Counter()
        self._said: set[str] = set()
        self.window.reset()

    def begin(self) -> None:
        with self._lock:
            self._clear()
            self.running = True

    def next_step(self, timestep: Tensor, percent_to_sigma: Callable[[float], float], schedule: Tensor | None) -> None:
        """Announce an evaluation of the model; the same `timestep` tensor again is still the same evaluation.

        timestep: noise levels (B,). percent_to_sigma: of the model's sampling. schedule: noise levels of the run.
        """
        if timestep is self._timestep:
            return
        if self.steps == 0 and self.window.bounded:
            # Reading the schedule waits for the device once a run, when nothing is queued yet.
            self.window.begin(percent_to_sigma, [] if schedule is None else schedule.tolist())
        self.window.advance(lambda: timestep.flatten()[0].item())
        self._timestep = timestep
        self.steps += 1

    def add_sparse(self, block: Block | None, stats: SpargeStats, tokens: str = "") -> None:
        with self._lock:
            if self.running:
                self._calls.append(SparseCall(self.steps, block, stats, tokens))

    def add_dense(self, dense: Dense) -> None:
        with self._lock:
            if not self.running:
                return
            self._dense[dense.reason] += 1
        self.say_once(dense.reason, f"dense attention: {dense}")

    def say_once(self, key: str, message: str) -> None:
        """Log a message, the first of its key in this run."""
        with self._lock:
            if not self.running or key in self._said:
                return
            self._said.add(key)
        log.info("SpargeAttn: %s", message)

    def end(self) -> RunSummary | None:
        """Close the run, drop its tensors and return its summary; None where no run is open."""
        with self._lock:
            if not self.running:
                return None
            # Where an error or an interruption ends the run, the device may be in no state to be read.
            complete = sys.exc_info()[0] is None
            self.summary = RunSummary.of(self.steps, self._dense, self._calls, read=complete)
            self._clear()
            return self.summary

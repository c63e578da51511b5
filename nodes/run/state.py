"""One sampling run of a patched model: where it is, and what became of its attention calls."""
from __future__ import annotations

import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ...kernels import SpargeStats
from ...kernels.failures import is_of_the_device
from ..call.arguments import AttentionCall
from ..call.plan import Dense
from ..call.transformer_blocks import TransformerBlock
from ..log import log
from .block_maps import BlockPictures, MapRequest
from .host_memory import Memory
from .refresh_schedule import RefreshSchedule
from .residual_memory import ALLOWED, mib
from .residuals import ResidualStore
from .sigma_window import SigmaWindow
from .stopwatch import Stopwatch
from .summary import CallRecord, RunSummary

EVERY = 8  # of many calls of a shape, one of so many is timed: events cost the host a tenth of a short call
FIRST = 32  # sparse, and dense, calls of a shape that are all timed
ENOUGH = 3  # dense calls of a shape, of which the median is compared with; the first may take longer


class RunState:
    """What a run collects. Several threads may add to it. It holds tensors only between `begin` and `end`."""

    def __init__(self, window: SigmaWindow, refreshes: int = 0,
                 memory: Memory = Memory()):
        """refreshes: as in `NodeSettings`. memory: of which residuals take a share."""
        self.window = window
        self.refresh = RefreshSchedule(refreshes)
        self.residuals = ResidualStore(memory)
        self.summary: RunSummary | None = None  # of the last run that ended
        self.map_request = MapRequest()  # for the next run
        self.running_prompt: Callable[[], str | None] = lambda: None  # ComfyUI's id of the prompt that it executes
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.running = False
        self.steps = 0
        self._timestep: Tensor | None = None
        self._calls: list[CallRecord] = []
        self._calls_of_step = 0
        self._dense: Counter[str] = Counter()
        self._timed_dense: Counter[tuple] = Counter()
        self._watched: Counter[tuple] = Counter()
        self._details: dict[str, str] = {}
        self._maps = BlockPictures(self.map_request)
        self._started = time.perf_counter()
        self._handled: BaseException | None = None  # what the code around the run was handling when it began
        self._prompt: str | None = None
        self._said: set[str] = set()
        self.window.reset()
        self.refresh.reset()
        self.residuals.clear()

    def begin(self) -> None:
        with self._lock:
            self._clear()
            self._handled = sys.exc_info()[1]
            self._prompt = self.running_prompt()
            self.running = True

    def next_step(self, timestep: Tensor, percent_to_sigma: Callable[[float], float], schedule: Tensor | None) -> None:
        """Announce an evaluation of the model; the same `timestep` tensor again is still the same evaluation.

        timestep: noise levels (B,).
        percent_to_sigma: of the model's sampling.
        schedule: noise levels of the run.
        """
        if timestep is self._timestep:
            return
        if self.steps == 0:
            self._maps.steps = 0 if schedule is None else len(schedule) - 1
            if self.window.bounded or self.refresh.count:
                # Reading the schedule waits for the device once a run, when nothing is queued yet.
                levels = [] if schedule is None else schedule.tolist()
                self.window.begin(percent_to_sigma, levels)
                self.refresh.begin(levels, self.window.lowest, self.window.highest, float(percent_to_sigma(0.0)))
        if self.refresh.due:
            self.residuals.end_refresh(self.steps)
        read, ahead = functools.cache(lambda: timestep.flatten()[0].item()), self.refresh.ahead
        self.window.advance(read)
        self.refresh.advance(read)
        if ahead and self.refresh.due:
            self._decide_about_residuals()
        self._timestep = timestep
        self.steps += 1
        self._calls_of_step = 0

    def _decide_about_residuals(self) -> None:
        """Before the first refresh, have none if the memory that was counted exceeds what they may take."""
        try:
            problem = self.residuals.decide()
        except Exception as error:
            if is_of_the_device(error):
                raise
            self.say_once("residuals", f"the memory of residuals is not known: {type(error).__name__}: {error}")
            return
        if problem:
            self.refresh.give_up(problem)
            self.say_once("residuals", f"no refreshes: {problem}")
        elif self.residuals.room.counted:
            self.say_once("residuals", f"residuals take {mib(self.residuals.room.counted)}")
        elif self.steps == 0:
            self.say_once("residuals", "no step comes before the first refresh, so the memory of residuals is not "
                                       "counted beforehand")

    def add_call(self, call: AttentionCall, block: TransformerBlock | None, watch: Stopwatch,
                 stats: SpargeStats | None = None, tokens: str = "", untuned: str = "") -> TransformerBlock | None:
        """Record a self-attention call of at least min_tokens, dense where it has no `stats`.

        block: None where the model does not number its transformer blocks.
        tokens, untuned: as in `CallRecord`.

        Returns the block under which to add the call's block map, None where the run does not want the map.
        """
        with self._lock:
            if not self.running:
                return None
            block = self._record(call, block, watch, stats, tokens, untuned=untuned)
            if stats is None:
                self._timed_dense[_shape(call)] += 1
            return block if stats is not None and self._maps.wants(self.steps, block) else None

    def watch(self, call: AttentionCall, dense: bool = False) -> Stopwatch:
        """A watch for a sparse or a dense call, which may not run."""
        kind = dense, *_shape(call)
        before = self._watched[kind]
        self._watched[kind] = before + 1
        # By the golden ratio, whose multiples have no period, so that no layer is passed over at every step.
        return Stopwatch(call.q.device, before < FIRST or before * 0.618034 % 1 < 1 / EVERY)

    def add_quantised(self, call: AttentionCall, block: TransformerBlock | None, why: Dense,
                      stats: SpargeStats | None = None) -> None:
        """Record a dense call that the kernels computed. why: it was dense. stats: None where it was over all blocks.
        """
        with self._lock:
            if not self.running:
                return
            self._record(call, block, Stopwatch(call.q.device, running=False), stats, quantised=why.reason)
        over = "all blocks" if stats is None else "nearly all blocks"
        self.say_once(f"quantised: {why.reason}", f"quantised attention over {over}: {why}")

    def _record(self, call: AttentionCall, block: TransformerBlock | None, watch: Stopwatch,
                stats: SpargeStats | None = None, tokens: str = "", quantised: str = "",
                untuned: str = "") -> TransformerBlock:
        numbered = block is not None
        block = block or TransformerBlock("call", self._calls_of_step)
        self._calls_of_step += 1
        work = call.batch * call.heads[0] * call.q_tokens * call.k_tokens
        self._calls.append(CallRecord(self.steps, block, numbered, _shape(call), work, watch, stats, tokens, quantised,
                                      untuned))
        return block

    def timed_dense(self, call: AttentionCall) -> bool:
        """Whether calls of this shape were often enough dense in this run to know how long that takes."""
        return self._timed_dense[_shape(call)] >= ENOUGH

    def add_map(self, block: TransformerBlock, mask: Tensor) -> None:
        """mask: bool (H, q_blocks, k_blocks)."""
        with self._lock:
            if self.running:
                self._maps.add(block, mask)

    def add_dense(self, dense: Dense) -> None:
        with self._lock:
            if not self.running:
                return
            self._dense[dense.reason] += 1
            if dense.detail:
                self._details.setdefault(dense.reason, dense.detail)
        self.say_once(dense.reason, f"dense attention: {dense}")

    def so_far(self) -> RunSummary:
        """The counts of the open run. Reads nothing from the device."""
        with self._lock:
            return self._summarise("the run goes on")

    def say_once(self, key: str, message: str) -> None:
        """Log a message, unless this run has logged one with this key."""
        if key in self._said:  # nearly always, and without waiting for the lock
            return
        with self._lock:
            if not self.running or key in self._said:
                return
            self._said.add(key)
        log.info("SpargeAttn: %s", message)

    def end(self) -> RunSummary | None:
        """Close the run, drop its tensors and return its summary; None where no run is open.

        Raises what reading the statistics raises. By then the run is closed, and its summary has the counts.
        """
        with self._lock:
            if not self.running:
                return None
            error = sys.exc_info()[1]
            interrupted = error is not None and error is not self._handled
            self.summary = None
            try:
                # What is known on the host comes first, and stays where the device can't be read.
                self.summary = self._summarise("the run was interrupted" if interrupted else
                                               "the numbers of this run could not be read, the log says why")
                # After an error or an interruption, the device may be in no state to be read.
                if not interrupted:
                    self.summary = self._summarise()
            finally:
                self._clear()
            return self.summary

    def _summarise(self, unread: str = "") -> RunSummary:
        summary = RunSummary.of(self.steps, self._dense, self._calls, unread)
        return replace(summary, details=self._details, residuals=self._about_residuals(),
                       seconds=time.perf_counter() - self._started, maps=None if unread else self._maps.fetch(),
                       prompt=self._prompt, ended=time.time())

    def _about_residuals(self) -> str:
        """What became of them, in words; empty where none were asked for."""
        if not self.refresh.count:
            return ""
        if not self.refresh.levels:
            return f"none: {self.refresh.problem}" if self.refresh.problem else ""
        store = self.residuals
        text = (f"refreshed at {len(self.refresh.levels)} noise levels, added to {store.used} sparse calls, "
                f"{mib(store.most_bytes)}")
        if store.most_host_bytes:
            text += f" on the GPU, {mib(store.most_host_bytes)} in the host's memory"
        if store.room.counted:
            text += f", {mib(store.room.counted)} counted before"
        return f"{text}; no memory for {store.refused}: {ALLOWED}" if store.refused else text


def _shape(call: AttentionCall) -> tuple:
    """What the time of a call depends on."""
    return call.q.dtype, call.batch, *call.heads, call.k_tokens, call.q.shape[-1], call.mask is None

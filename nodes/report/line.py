"""A run in one line, for the node that patched the model."""
from __future__ import annotations

import time
from collections.abc import Callable

from ..log import log
from ..run.summary import RunSummary
from .advice import FAULTS

INTERVAL = 0.5  # seconds between two lines
# Reasons to stay dense that hold for some calls of nearly every model. Others come first, the last one last.
_USUAL = "fewer tokens than min_tokens", "cross-attention"


class NodeLine:
    """The line of a running node. Several threads may update it. It raises nothing.

    show: shows a line on the node; None shows it nowhere.
    """

    def __init__(self, show: Callable[[str], None] | None):
        self._show = show
        self._due = 0.0

    def update(self, text: Callable[[], str]) -> None:
        """Show a line unless the last update is newer than `INTERVAL`."""
        if self._show is None or (now := time.monotonic()) < self._due:
            return
        self._due = now + INTERVAL
        self.write(text)

    def write(self, text: Callable[[], str]) -> None:
        """Show a line at once."""
        if self._show is None:
            return
        try:
            self._show(text())
        except Exception:  # a connection may break in any way, and a line on a node is not worth a run
            log.debug("SpargeAttn: a line could not be shown", exc_info=True)


def while_sampling(so_far: RunSummary) -> str:
    """so_far: counts of the run that goes on; nothing of it is read from the device."""
    if not so_far.sparse:
        return f"step {so_far.steps} · nothing sparse yet{_because(so_far)}"
    return " · ".join([f"step {so_far.steps}", f"sparse attention calls: {so_far.sparse}", *_faults(so_far)])


def after_run(summary: RunSummary) -> str:
    if summary.unread:
        return summary.unread
    if not summary.sparse or summary.sparsity is None:
        return f"nothing sparse{_because(summary)}"
    skipped = summary.sparsity
    if summary.skipped is not None and summary.skipped_little and not summary.mostly_dense:
        skipped = summary.skipped
    parts = [f"{skipped:.0%} skipped" if skipped >= 0.1 else f"{skipped:.1%} skipped"]
    if summary.reference:
        parts.append("CPU reference")
    elif summary.speedup is not None:
        parts.append(f"attention {_ratio(summary.speedup)}")
    if summary.mostly_dense:
        parts.append(f"most attention stayed dense{_because(summary)}")
    elif summary.skipped_little:
        parts.append("the log says what to change")
    return " · ".join([*parts, *([] if summary.mostly_dense else _faults(summary))])


def _ratio(speedup: float) -> str:
    return f"{speedup:.1f} × faster" if speedup >= 1 else f"{1 / speedup:.1f} × slower"


def _because(summary: RunSummary) -> str:
    """Why most of the calls were dense that might have been sparse; empty where nothing is known."""
    ranked = sorted(summary.not_sparse, key=lambda reason: (not reason.startswith(tuple(FAULTS)), _usual(reason)))
    if ranked:
        return f": {_with_detail(summary, ranked[0])}"
    return f": {summary.problem}" if summary.problem else ""


def _usual(reason: str) -> int:
    return 1 + _USUAL.index(reason) if reason in _USUAL else 0


def _faults(summary: RunSummary) -> list[str]:
    return [f"{count} dense: {_with_detail(summary, reason)}" for reason, count in summary.dense.items()
            if reason.startswith(tuple(FAULTS))]


def _with_detail(summary: RunSummary, reason: str) -> str:
    return f"{reason} ({summary.details[reason]})" if reason in summary.details else reason

"""What a benchmark found, and that in words."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .._triton.config import AttendConfig
from .shapes import Shape

MARGIN = 1.02  # a configuration replaces the table's where it is faster by more than this


@dataclass(frozen=True)
class Timed:
    """An attention and its time, None where `problem` says why there is none. error: relative L1 to dense attention."""

    name: str
    ms: float | None = None
    problem: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Tried:
    """A launch configuration and its time, None where `problem` says why there is none."""

    config: AttendConfig
    ms: float | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        cap = f", {self.config.maxnreg} registers" if self.config.maxnreg else ""
        return f"{self.config.warps} warps, {self.config.stages} stage{'s' * (self.config.stages > 1)}{cap}"


@dataclass
class Result:
    """
    shape: as timed. fast: whether ours are the fast kernels, not the reference. pv_format: of P·V, where it was tuned.
    dense: the attention that those of `ours` are compared with. tried: launch configurations, the table's first;
    `faster` is the one that calls take from now on in place of the table's, and `gain` the table's time in units of its
    own. notes: what a reader must know, such as why nothing was tried.
    """

    shape: Shape
    dtype: torch.dtype
    machine: Mapping[str, str]
    fast: bool
    pv_format: str = ""
    dense: Timed | None = None
    ours: list[Timed] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    faster: AttendConfig | None = None
    gain: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def headline(self) -> str:
        if not self.fast:
            return "There are no fast kernels here"
        ratio = next((self.ratio(row) for row in self.ours if row.name == name_of(0.3)), None)
        if ratio is None:
            return "SpargeAttn was not timed"
        return "30% of the blocks: " + (f"{ratio:.1f} × as fast as dense" if ratio >= 1 else
                                         f"{1 / ratio:.1f} × slower than dense")

    @property
    def verdict(self) -> str:
        """What became of the launch configuration; empty where none was tried."""
        if self.faster is not None:
            return f"{Tried(self.faster).name}: {self.gain - 1:.0%} faster than the pack's own launch configuration"
        if len(self.tried) > 1:
            return f"no launch configuration is faster than the pack's own by more than {MARGIN - 1:.0%}"
        return ""

    def ratio(self, row: Timed) -> float | None:
        """How many times as fast as dense attention."""
        return self.dense.ms / row.ms if self.dense and self.dense.ms and row.ms else None

    def text(self) -> str:
        """All of it, in Markdown that also reads as plain text."""
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"**{self.shape}**, {dtype}" + (f", P·V {self.pv_format}" if self.pv_format else ""), "",
                 ", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        if self.dense:
            lines += ["| attention | ms | times as fast | L1 |", "|---|---|---|---|",
                      *map(self._row, [self.dense, *self.ours]), ""]
        if self.tried:
            lines += ["| launch configuration | ms, 50% of the blocks |", "|---|---|",
                      *(f"| {row.name}{self._mark(row, first)} | {_time(row)} |"
                        for first, row in zip([True, *[False] * len(self.tried)], self.tried)), ""]
        return "\n".join([*lines, *filter(None, [self.verdict]), *self.notes]).strip()

    def _row(self, row: Timed) -> str:
        ratio = self.ratio(row)
        return (f"| {row.name} | {_time(row)} | {'' if ratio is None else f'{ratio:.2f}'} | "
                f"{'' if row.error is None else f'{row.error:.3f}'} |")

    def _mark(self, row: Tried, first: bool) -> str:
        return " (the pack's own)" if first else " (taken)" if row.config == self.faster else ""


def name_of(share: float) -> str:
    """How a row is called that keeps a share of the blocks."""
    return "SpargeAttn, all blocks" if share == 1 else f"SpargeAttn, {share:.0%} of the blocks"


def problem_of(error: BaseException) -> str:
    """The last line of the cause of an error, short enough for a table."""
    cause = error.__cause__ or error
    lines = (str(cause).strip() or type(cause).__name__).splitlines()
    return " ".join(lines[-1].replace("|", "/").split())[:120]


def _time(row: Timed | Tried) -> str:
    return f"not timed: {row.problem}" if row.ms is None else f"{row.ms:.3g}" if row.ms < 100 else f"{row.ms:.0f}"

"""What happened in a sampling run, as plain numbers and as text."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import torch
from torch import Tensor

from ...kernels import SpargeStats
from ..call.transformer_blocks import TransformerBlock
from .block_maps import BlockPictures
from .stopwatch import Stopwatch

LITTLE = 0.05  # a run that skips less of its attention than this has gained next to nothing by it


@dataclass(frozen=True)
class CallRecord:
    """A self-attention call of at least min_tokens; its statistics may still be on the device.

    step: counted from 1.
    block: its transformer block; where the model does not number them, its place in the step, as the block `call:n`.
    numbered: whether the model numbers its transformer blocks.
    shape: what its time depends on.
    work: products of a query and a key that dense attention takes.
    time: how long it took, where it was timed.
    stats: None where it was dense, over all blocks.
    tokens: order and grid of its tokens in words, empty where the grid is not known.
    quantised: why this pack's kernels computed it over all blocks, or nearly all; empty where they did not.
    untuned: why it used the widgets in place of tuned parameters, empty where it did not.
    """

    step: int
    block: TransformerBlock
    numbered: bool
    shape: tuple
    work: int
    time: Stopwatch
    stats: SpargeStats | None = None
    tokens: str = ""
    quantised: str = ""
    untuned: str = ""


@dataclass(frozen=True)
class CallTimes:
    """The sparse calls of one shape.

    calls: how many.
    sparse: median milliseconds of those that were timed.
    dense: the same of the calls of this shape that stayed dense in the same run, None where there was none.
    """

    calls: int
    sparse: float
    dense: float | None

    @property
    def saved(self) -> float:
        """Milliseconds."""
        return 0.0 if self.dense is None else self.calls * (self.dense - self.sparse)


@dataclass(frozen=True)
class RunSummary:
    """Counts and means of a run. Shares are None where none was read.

    steps: evaluations of the model by the sampler.
    sparse: number of calls that went sparse.
    dense: number of calls that were left to the model's own attention, by reason.
    quantised: number of calls that this pack's kernels computed over all blocks, or nearly all, by reason.
    quantised_sparsity: mean share of block pairs that they skipped in those, None where all went over all blocks.
    sparsity: mean share of skipped block pairs over the sparse calls.
    pv_skipped: mean share of skipped P·V products among the other block pairs, over the sparse calls.
    skipped: share of the products Q·K and P·V of all self-attention of at least min_tokens, dense calls included.
    by_block: mean sparsity of each transformer block; empty where the model does not number them.
    by_step: mean sparsity of each step, counted from 1.
    tokens: number of sparse calls by order and grid of their tokens, where the grid is known.
    untuned: number of sparse calls that used the widgets in place of tuned parameters, by reason.
    details: an example for each reason in `dense` that has one.
    cells: mean sparsity of each transformer block (as in `CallRecord`) and step, None where all calls were left
        to the model's own attention.
    times: one for each shape of a timed sparse call.
    reference: whether sparse calls were computed on a CPU, where nothing is gained.
    seconds: from the start of the run to its end.
    ended: when, in seconds of `time.time`.
    prompt: ComfyUI's id of the prompt that the run was part of.
    maps: the block maps that were kept.
    residuals: what became of the residuals of dense attention, in words; empty where none were asked for.
    problem: why nothing was sparse, empty where something was.
    unread: why sparsity and all else that lies on the device is not known, empty where it was read.
    """

    steps: int
    sparse: int
    dense: dict[str, int]
    quantised: dict[str, int] = field(default_factory=dict)
    quantised_sparsity: float | None = None
    sparsity: float | None = None
    pv_skipped: float | None = None
    skipped: float | None = None
    by_block: dict[TransformerBlock, float] = field(default_factory=dict)
    by_step: dict[int, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    untuned: dict[str, int] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    cells: dict[tuple[TransformerBlock, int], float | None] = field(default_factory=dict)
    times: tuple[CallTimes, ...] = ()
    reference: bool = False
    seconds: float = 0.0
    ended: float = 0.0
    prompt: str | None = None
    maps: BlockPictures | None = None
    residuals: str = ""
    problem: str = ""
    unread: str = ""

    @classmethod
    def of(cls, steps: int, dense: Counter[str], calls: Sequence[CallRecord], unread: str = "") -> RunSummary:
        """Summarise. Without a reason in `unread` this fetches the statistics, which waits for the device."""
        measured = [(call, call.stats) for call in calls if call.stats is not None]
        sparse = [(call, stats) for call, stats in measured if not call.quantised]
        tokens = Counter(call.tokens for call, _ in sparse if call.tokens)
        untuned = Counter(call.untuned for call, _ in sparse if call.untuned)
        quantised = Counter(call.quantised for call in calls if call.quantised)
        known = cls(steps, len(sparse), dict(dense.most_common()), dict(quantised.most_common()),
                    tokens=dict(tokens.most_common()), untuned=dict(untuned.most_common()), unread=unread,
                    reference=any(call.time.device.type == "cpu" for call, _ in sparse))
        if unread or not sparse:
            return known
        kept = _read([stats.kept.mean() for _, stats in measured])
        pv_skipped = _read([stats.pv_skipped.mean() for _, stats in measured])
        shares = [(call, 1 - share, pv) for (call, _), share, pv in zip(measured, kept, pv_skipped)]
        sparsity = [(call, x) for call, x, _ in shares if not call.quantised]
        strict = [x for call, x, _ in shares if call.quantised]
        shares += [(call, 0.0, 0.0) for call in calls if call.quantised and call.stats is None]
        cells = dict.fromkeys((call.block, call.step) for call in calls)
        cells |= _means(((call.block, call.step), x) for call, x, _ in shares)
        # P·V is half of the products, and is skipped wholly with a block pair.
        skipped = sum(call.work * (x + (1 - x) * pv / 2) for call, x, pv in shares)
        return replace(known, sparsity=fmean(x for _, x in sparsity),
                       quantised_sparsity=fmean(strict) if strict else None,
                       pv_skipped=fmean(pv for call, _, pv in shares if not call.quantised),
                       skipped=skipped / sum(call.work for call in calls),
                       by_block=_means((call.block, x) for call, x in sparsity if call.numbered),
                       by_step=_means((call.step, x) for call, x in sparsity),
                       cells=dict(sorted(cells.items())), times=_times(calls))

    @property
    def not_sparse(self) -> dict[str, int]:
        """Number of calls by the reason why they were not sparse, whatever computed them."""
        return dict((Counter(self.dense) + Counter(self.quantised)).most_common())

    @property
    def quantised_over(self) -> str:
        """What the kernels computed those calls over."""
        if self.quantised_sparsity is None:
            return "over all blocks"
        return f"over nearly all blocks ({self.quantised_sparsity:.1%} skipped)"

    @property
    def skipped_little(self) -> bool:
        """Whether the sparse calls of this run skipped so little of its attention that a user should know."""
        return self.skipped is not None and self.skipped < LITTLE

    @property
    def mostly_dense(self) -> bool:
        """Whether it skipped little because most of its attention stayed dense."""
        return self.skipped_little and self.sparsity is not None and self.sparsity >= 2 * LITTLE

    @property
    def saved(self) -> float | None:
        """Seconds that the sparse calls took less than dense ones of the same shape in this run; None if unknown."""
        known = [times.saved for times in self.times if times.dense is not None]
        return sum(known) / 1000 if known else None

    @property
    def speedup(self) -> float | None:
        """Time of dense calls over that of the sparse ones of the same shape in this run; None if unknown."""
        known = [times for times in self.times if times.dense is not None]
        sparse = sum(times.calls * times.sparse for times in known)
        return 1 + sum(times.saved for times in known) / sparse if sparse else None

    def __str__(self) -> str:
        text = f"{self.sparse} attention calls sparse"
        if self.sparsity is not None:
            text += f" (mean sparsity {self.sparsity:.1%}"
            text += f", P·V skipped {self.pv_skipped:.1%})" if self.pv_skipped else ")"
        if self.quantised:
            text += f", {sum(self.quantised.values())} quantised {self.quantised_over}: {_counts(self.quantised)}"
        text += f", {sum(self.dense.values())} dense"
        if self.dense:
            text += f": {_counts(self.dense)}"
        if self.tokens:
            text += "; tokens: " + ", ".join(f"{count} in {order}" for order, count in self.tokens.items())
        if self.residuals:
            text += f"; residuals {self.residuals}"
        return text

    def table(self) -> str:
        """Sparsity of every transformer block and step, for a log."""
        rows = [("block", self.by_block), ("step", self.by_step)]
        return "\n".join(f"sparsity by {name}: " + ", ".join(f"{key} {value:.1%}" for key, value in values.items())
                         for name, values in rows if values)


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _times(calls: Sequence[CallRecord]) -> tuple[CallTimes, ...]:
    """Medians, because the first call of a shape may include the compilation of its kernels."""
    groups: dict[tuple, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for call in calls:
        milliseconds = call.time.milliseconds()
        if milliseconds is not None and not call.quantised:
            groups[call.shape][call.stats is None].append(milliseconds)
    sparse_calls = Counter(call.shape for call in calls if call.stats is not None and not call.quantised)
    return tuple(CallTimes(sparse_calls[shape], median(sparse), median(dense) if dense else None)
                 for shape, (sparse, dense) in groups.items() if sparse)


def _means(pairs: Iterable[tuple]) -> dict:
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return {key: fmean(groups[key]) for key in sorted(groups)}


def _read(values: Sequence[Tensor]) -> list[float]:
    """Host numbers of 0-D tensors, with one transfer a device."""
    numbers = {}
    for device in {value.device for value in values}:
        here = [i for i, value in enumerate(values) if value.device == device]
        numbers |= zip(here, torch.stack([values[i] for i in here]).tolist())
    return [numbers[i] for i in range(len(values))]

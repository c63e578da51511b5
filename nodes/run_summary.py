"""What happened in a sampling run, as plain numbers and as text."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from ..kernels import SpargeStats
from .blocks import Block


@dataclass(frozen=True)
class SparseCall:
    """A call that went sparse; its statistics may still be on their way to the device.

    tokens: their order and grid in words, empty where the grid is not known.
    """

    step: int
    block: Block | None
    stats: SpargeStats
    tokens: str = ""


@dataclass(frozen=True)
class RunSummary:
    """Counts and means of a run.

    steps: evaluations of the model by the sampler. sparse: calls that went sparse. dense: calls that did not, by
    reason. sparsity, pv_skipped: mean share of skipped block pairs, and of skipped P·V products among the others,
    over the sparse calls; None where none was read. by_block, by_step: mean sparsity of each; steps count from 1, and
    a model that does not number its blocks has an empty `by_block`. tokens: sparse calls by the order and grid of their
    tokens, those whose grid is known.
    """

    steps: int
    sparse: int
    dense: dict[str, int]
    sparsity: float | None = None
    pv_skipped: float | None = None
    by_block: dict[Block, float] = field(default_factory=dict)
    by_step: dict[int, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: int, dense: Counter[str], calls: Sequence[SparseCall], read: bool) -> RunSummary:
        """Summarise; `read` fetches the statistics, which waits for the device."""
        dense = dict(dense.most_common())
        tokens = dict(Counter(call.tokens for call in calls if call.tokens).most_common())
        if not (calls and read):
            return cls(steps, len(calls), dense, tokens=tokens)
        kept = _read([call.stats.kept.mean() for call in calls])
        pv_skipped = _read([call.stats.pv_skipped.mean() for call in calls])
        sparsity = [1 - x for x in kept]
        return cls(steps, len(calls), dense, fmean(sparsity), fmean(pv_skipped),
                   _means((call.block, x) for call, x in zip(calls, sparsity) if call.block is not None),
                   _means((call.step, x) for call, x in zip(calls, sparsity)), tokens)

    def __str__(self) -> str:
        text = f"{self.sparse} attention calls sparse"
        if self.sparsity is not None:
            text += f" (mean sparsity {self.sparsity:.1%}"
            text += f", P·V skipped {self.pv_skipped:.1%})" if self.pv_skipped else ")"
        text += f", {sum(self.dense.values())} dense"
        if self.dense:
            text += ": " + ", ".join(f"{count} {reason}" for reason, count in self.dense.items())
        if self.tokens:
            text += "; tokens: " + ", ".join(f"{count} in {order}" for order, count in self.tokens.items())
        return text

    def table(self) -> str:
        """Sparsity of every block and step, for a log."""
        rows = [("block", self.by_block), ("step", self.by_step)]
        return "\n".join(f"sparsity by {name}: " + ", ".join(f"{key} {value:.1%}" for key, value in values.items())
                         for name, values in rows if values)


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

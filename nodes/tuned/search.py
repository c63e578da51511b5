"""The search for each layer's thresholds: as sparse as the error of each head allows, all heads of a call at once.

After SpargeAttn (arXiv 2502.18137, 3.6): first the selection of blocks with L1 = Σ|O − O'| / Σ|O| below l1, then the
P·V threshold with L1 below l2. A `Candidate` fixes everything but the amount of blocks. For each candidate and head,
bisection finds the most aggressive amount that holds the bound. Further calls can only make an amount stricter, so that
what is found holds for every call seen. Then each head takes the candidate that leaves it the least work.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import SpargeParams

_LEVELS = 31
# From the most aggressive to every block. The share that cdf leaves out falls by a constant factor from level to level,
# and the share that topk keeps grows by one.
AMOUNTS = {
    "cdf": tuple(1 - 0.7 * (0.002 / 0.7) ** (i / (_LEVELS - 2)) for i in range(_LEVELS - 1)) + (1.0,),
    "topk": tuple(0.02 * (0.9 / 0.02) ** (i / (_LEVELS - 2)) for i in range(_LEVELS - 1)) + (1.0,),
}
PV_THRESHOLDS = (4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0, 17.0, 20.0, math.inf)
SEARCHED_CURVES = ("row-major", "hilbert", "blocked", "time-major")  # an earlier one wins a tie
# Work of a block pair by P·V format, and of the pooled tail, in units of dense fp16 attention; of an H100.
_PV_WORK = {"fp16": 1.0, "fp8": 0.7}
_TAIL_WORK = 0.025
_JUDGE_OFF = -1.0  # the similarity threshold that switches the judge off
_MOST_REFUSALS = 32  # choices that a call may refuse before its layer stays dense
_SIMILARITIES = {"cdf": (_JUDGE_OFF, 0.3, 0.5), "topk": (_JUDGE_OFF,)}


class Candidate(NamedTuple):
    """How blocks are selected and what becomes of the others, apart from the amount of blocks."""

    selection: str
    skipped: str
    pv_dtype: str
    curve: str
    similarity: float


# All heads of a call share a variant; each head may choose among the candidates of that variant.
VARIANTS = tuple((selection, skipped, pv) for pv in _PV_WORK for skipped in ("drop", "pooled") for selection in AMOUNTS)
CANDIDATES = tuple(Candidate(*variant, curve, similarity) for variant in VARIANTS for curve in SEARCHED_CURVES
                   for similarity in _SIMILARITIES[variant[0]])


@dataclass(frozen=True, eq=False)
class TunedSetting:
    """How a layer's calls go sparse.

    params: thresholds, float32 (H,) on the CPU; the P·V threshold is the number inf where all heads have it.
    curves: order of the tokens for each head of K, names among `SEARCHED_CURVES`.
    skipped, pv_dtype: as in `sparge_attention`.
    """

    params: SpargeParams
    curves: tuple[str, ...]
    skipped: str
    pv_dtype: str

    @property
    def dense_heads(self) -> Tensor:
        """bool (H,), heads that keep every block."""
        return torch.as_tensor(self.params.amount) >= 1


class Measured(NamedTuple):
    """What a call gave, each float32 (H,) on the CPU: L1 against dense attention, and the share of blocks attended."""

    error: Tensor
    kept: Tensor


class Choice(NamedTuple):
    """A setting that may become the layer's.

    kept: float32 (H,), mean share of blocks that it attends.
    candidates: int64 (H,), the candidate of each head, an index into `CANDIDATES`.
    """

    setting: TunedSetting
    kept: Tensor
    candidates: Tensor


# Runs the call with a setting; None where it can't, for want of a grid or of hardware.
Measure = Callable[[TunedSetting], Measured | None]


@dataclass(frozen=True)
class Bounds:
    """What a setting has to hold.

    l1, l2: largest L1 of a head before and after the P·V threshold; equal, they leave that threshold off.
    min_gain: sparsity below which a head keeps every block.

    Raises ValueError unless 0 < l1 ≤ l2 < 1 and 0 ≤ min_gain < 1.
    """

    l1: float = 0.05
    l2: float = 0.06
    min_gain: float = 0.1

    def __post_init__(self):
        if not 0 < self.l1 <= self.l2 < 1:
            raise ValueError(f"l1 and l2 must hold 0 < l1 <= l2 < 1; got l1={self.l1:g}, l2={self.l2:g}")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain must lie in [0, 1); got {self.min_gain:g}")


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """What is known of a layer; frozen, so that an interrupted `learn` leaves it as it was.

    calls: number of calls that it was tuned on.
    levels: int64 (candidates, H), index into `AMOUNTS` of the least amount that held l1 in every call; the number of
        amounts where none did.
    kept: float32 (candidates, H), mean share of blocks attended at that amount.
    pv_levels: int64 (H,), index into `PV_THRESHOLDS` of the least that held l2.
    error: float32 (H,), largest L1 of the setting chosen after each call.
    unseen_calls: number of calls that it was measured on and not tuned on.
    unseen: float32 (H,), largest L1 on those calls.
    sparsity: float32 (H,), mean share of blocks that the setting skips.
    setting: None where the layer stays dense.
    """

    heads: int
    kv_heads: int
    bounds: Bounds
    calls: int
    levels: Tensor
    kept: Tensor
    pv_levels: Tensor
    error: Tensor
    unseen_calls: int
    unseen: Tensor
    sparsity: Tensor
    setting: TunedSetting | None = None

    @classmethod
    def start(cls, heads: int, kv_heads: int, bounds: Bounds = Bounds()) -> LayerSearch:
        zeros = torch.zeros(heads)
        return cls(heads, kv_heads, bounds, 0, torch.zeros(len(CANDIDATES), heads, dtype=torch.long),
                   torch.ones(len(CANDIDATES), heads), torch.zeros(heads, dtype=torch.long), zeros, 0, zeros, zeros)

    def learn(self, measure: Measure) -> LayerSearch:
        """The search after one more call. An exception from `measure` loses this call alone."""
        rows = [self._tighten(candidate, self.levels[i], self.kept[i], measure)
                for i, candidate in enumerate(CANDIDATES)]
        levels, kept = (torch.stack(x) for x in zip(*rows))
        found = replace(self, calls=self.calls + 1, levels=levels, kept=kept, unseen_calls=0,
                        unseen=torch.zeros(self.heads))
        for _ in range(_MOST_REFUSALS):
            if (choice := found._choose()) is None:
                break
            error = _measured(measure, choice.setting).error
            if not (over := ~(error <= self.bounds.l1)).any():
                return found._with_pv(choice, error, measure)
            found = found._refuse(choice, over)
        return found._dense()

    def evaluate(self, measure: Measure) -> LayerSearch:
        """The search with the error of its setting on a call that it does not learn from.

        A layer whose error there is not finite stays dense from now on.
        """
        measured = None if self.setting is None else measure(self.setting)
        if measured is None:
            return self
        if not measured.error.isfinite().all():
            return replace(self, levels=torch.full_like(self.levels, _LEVELS), kept=torch.ones_like(self.kept))._dense()
        return replace(self, unseen_calls=self.unseen_calls + 1, unseen=torch.maximum(self.unseen, measured.error))

    def _dense(self) -> LayerSearch:
        zeros = torch.zeros(self.heads)
        return replace(self, setting=None, sparsity=zeros, error=zeros, unseen=zeros)

    def _with_pv(self, choice: Choice, error: Tensor, measure: Measure) -> LayerSearch:
        """The search with this setting and, between l1 and l2, its P·V thresholds. error: of the setting without."""
        setting, levels = choice.setting, self.pv_levels
        if self.bounds.l2 > self.bounds.l1:
            off, dense = torch.full_like(levels, len(PV_THRESHOLDS) - 1), setting.dense_heads
            if self.calls > 1:  # what earlier calls need is known for the candidates that they were measured with
                levels = torch.where(_same_candidates(self.setting, setting), levels, off)
            levels, _, _ = bisect(
                lambda level: measure(_skip_products(setting, level, dense)), levels, len(PV_THRESHOLDS) - 1,
                self.bounds.l2, first=levels if self.calls > 1 else None)
            skipping = _skip_products(setting, levels, dense)
            with_products_skipped = _measured(measure, skipping).error
            if (with_products_skipped <= self.bounds.l2).all():
                setting, error = skipping, with_products_skipped
            else:
                levels = off
        return replace(self, pv_levels=levels, setting=setting, sparsity=1 - choice.kept,
                       error=torch.maximum(self.error, error))

    def _tighten(self, candidate: Candidate, start: Tensor, kept: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
        """(level, mean kept) of each head after one more call."""
        def at(level: Tensor) -> Measured | None:
            amounts = torch.tensor(AMOUNTS[candidate.selection])[level.clamp(max=_LEVELS - 1)]
            return measure(_setting(candidate, amounts, torch.full((self.heads,), candidate.similarity),
                                    (candidate.curve,) * self.kv_heads))

        level, first, last = bisect(at, start, _LEVELS, self.bounds.l1, first=start if self.calls else None)
        # Where the amount became stricter than the earlier calls were measured at, those calls need more blocks too,
        # by the ratio of this call.
        ratio = torch.where(level > start, last / first.clamp(min=1e-6), 1.0)
        mean = ((kept * ratio).clamp(max=1) * self.calls + last) / (self.calls + 1)
        return level, torch.where(level < _LEVELS, mean, 1.0)

    def _choose(self) -> Choice | None:
        """The choice that leaves the least work and holds the bound as far as is known, None where no head gains."""
        best, least = None, math.inf
        every, group = torch.arange(self.heads), self.heads // self.kv_heads
        for variant in VARIANTS:
            rows = torch.tensor([i for i, candidate in enumerate(CANDIDATES) if candidate[:3] == variant])
            rows = rows.view(len(SEARCHED_CURVES), -1)
            holds = self.levels[rows] < _LEVELS  # (curves, similarities, H)
            gains = holds & (self.kept[rows] <= 1 - self.bounds.min_gain)
            kept, which = torch.where(gains, self.kept[rows], 1.0).min(1)  # (curves, H)
            # The heads that share a head of K share its order. It has to hold for all of them, because those without
            # gain keep every block in that order.
            fits = holds.any(1).unflatten(1, (self.kv_heads, group)).all(-1)  # (curves, Hkv)
            if not fits.any(0).all():
                continue
            mean = kept.unflatten(1, (self.kv_heads, group)).mean(-1)
            curve = torch.where(fits, mean, math.inf).argmin(0)  # (Hkv,)
            by_head = curve.repeat_interleave(group)
            kept = kept[by_head, every]
            selection, skipped, pv_dtype = variant
            work = kept.mean().item() * _PV_WORK[pv_dtype] + (_TAIL_WORK if skipped == "pooled" else 0)
            sparse = kept < 1
            if work >= least - 1e-9 or not sparse.any():
                continue
            chosen = rows[by_head, which[by_head, every]]
            amounts = torch.tensor(AMOUNTS[selection])[self.levels[chosen, every].clamp(max=_LEVELS - 1)]
            similarity = torch.tensor([CANDIDATES[i].similarity for i in chosen.tolist()])
            setting = _setting(CANDIDATES[int(rows[0, 0])], torch.where(sparse, amounts, 1.0),
                               torch.where(sparse, similarity, _JUDGE_OFF),
                               tuple(SEARCHED_CURVES[c] for c in curve.tolist()))
            best, least = Choice(setting, kept, chosen), work
        return best

    def _refuse(self, choice: Choice, over: Tensor) -> LayerSearch:
        """The search that knows that a choice did not hold for the heads `over` (H,), measured beside the others.

        Those that skipped blocks keep every block with that candidate. For those that kept every block, no candidate of
        that variant and order holds. So each refusal leaves fewer choices.
        """
        levels, kept = self.levels.clone(), self.kept.clone()
        for head in over.nonzero().flatten().tolist():
            refused = int(choice.candidates[head])
            if choice.kept[head] < 1:
                levels[refused, head], kept[refused, head] = _LEVELS - 1, 1.0
            else:
                alike = [i for i, other in enumerate(CANDIDATES) if other[:4] == CANDIDATES[refused][:4]]
                levels[alike, head], kept[alike, head] = _LEVELS, 1.0
        return replace(self, levels=levels, kept=kept)


def bisect(measure: Callable[[Tensor], Measured | None], start: Tensor, top: int, bound: float,
           first: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The least level from `start` on whose error is at most `bound`, for all heads at once; `top` where none is.

    measure: the call at levels (H,).
    start: int64 (H,).
    first: levels to try first, the middle by default.

    Returns (level, kept at the levels tried first, kept at the level found), the last 1 where nothing was measured.
    A level that is returned below `top` was measured, and errors that are NaN never hold.
    """
    low, high = start.clone(), torch.full_like(start, top)
    level = (low + high) // 2 if first is None else first
    opening = None
    last = torch.ones(len(start))
    while (low < high).any():
        measured = measure(level)
        if measured is None:
            return torch.full_like(start, top), last, last
        opening = measured.kept if opening is None else opening
        undecided, holds = low < high, measured.error <= bound
        last = torch.where(undecided & holds, measured.kept, last)
        high = torch.where(undecided & holds, level, high)
        low = torch.where(undecided & ~holds, level + 1, low)
        level = (low + high) // 2
    return low, last if opening is None else opening, last


def _measured(measure: Measure, setting: TunedSetting) -> Measured:
    """Of a setting that the search chose, from what this call can run."""
    measured = measure(setting)
    if measured is None:
        raise RuntimeError("a chosen setting must be one that the call can run")
    return measured


def _setting(candidate: Candidate, amounts: Tensor, similarity: Tensor, curves: tuple[str, ...]) -> TunedSetting:
    name = "cdf_threshold" if candidate.selection == "cdf" else "topk"
    params = SpargeParams(**{name: amounts}, similarity_threshold=similarity)
    return TunedSetting(params, curves, candidate.skipped, candidate.pv_dtype)


def _skip_products(setting: TunedSetting, levels: Tensor, dense: Tensor) -> TunedSetting:
    """The setting with P·V thresholds; heads that keep every block keep every product too."""
    thresholds = torch.where(dense, math.inf, torch.tensor(PV_THRESHOLDS)[levels])
    values = dict(setting.params.items()) | {"pv_threshold": math.inf if thresholds.isinf().all() else thresholds}
    return replace(setting, params=SpargeParams(**values))


def _same_candidates(before: TunedSetting | None, now: TunedSetting) -> Tensor:
    """bool (H,), heads that skipped blocks before, with the candidate that they have now."""
    heads = len(now.dense_heads)
    if before is None or ((before.params.selection, before.skipped, before.pv_dtype)
                          != (now.params.selection, now.skipped, now.pv_dtype)):
        return torch.zeros(heads, dtype=torch.bool)
    curves = torch.tensor([a == b for a, b in zip(before.curves, now.curves)])
    same_judge = torch.as_tensor(before.params.similarity_threshold == now.params.similarity_threshold)
    return curves.repeat_interleave(heads // len(curves)) & same_judge & ~before.dense_heads

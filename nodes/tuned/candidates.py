"""What the search for thresholds may choose from, and how a layer's calls go sparse once it has chosen."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import SpargeParams

LEVELS = 31
# From the most aggressive to every block. The share that cdf leaves out falls by a constant factor from level to level,
# and the share that topk keeps grows by one.
AMOUNTS = {
    "cdf": tuple(1 - 0.7 * (0.002 / 0.7) ** (i / (LEVELS - 2)) for i in range(LEVELS - 1)) + (1.0,),
    "topk": tuple(0.02 * (0.9 / 0.02) ** (i / (LEVELS - 2)) for i in range(LEVELS - 1)) + (1.0,),
}
PV_THRESHOLDS = (4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0, 17.0, 20.0, math.inf)
SEARCHED_CURVES = ("row-major", "hilbert", "blocked", "time-major")  # an earlier one wins a tie
JUDGE_OFF = -1.0  # the similarity threshold that switches the judge off
_SIMILARITIES = {"cdf": (JUDGE_OFF, 0.3, 0.5), "topk": (JUDGE_OFF,)}
# Work of a block pair by P·V format, and of the pooled tail, in units of dense fp16 attention; of an H100.
_PV_WORK = {"fp16": 1.0, "int8": 0.7}
_TAIL_WORK = 0.025


class Variant(NamedTuple):
    """What all heads of a call share."""

    selection: str
    skipped: str
    pv_dtype: str

    def work(self, kept: float) -> float:
        """Of a call that attends this share of the blocks, in units of dense fp16 attention."""
        return kept * _PV_WORK[self.pv_dtype] + (_TAIL_WORK if self.skipped == "pooled" else 0)


class Candidate(NamedTuple):
    """How blocks are selected and what becomes of the others, apart from the amount of blocks."""

    selection: str
    skipped: str
    pv_dtype: str
    curve: str
    similarity: float

    @property
    def variant(self) -> Variant:
        return Variant(self.selection, self.skipped, self.pv_dtype)


# All heads of a call share a variant; each head may choose among the candidates of that variant.
VARIANTS = tuple(Variant(selection, skipped, pv_dtype) for pv_dtype in _PV_WORK for skipped in ("drop", "pooled")
                 for selection in AMOUNTS)
CANDIDATES = tuple(Candidate(*variant, curve, similarity) for variant in VARIANTS for curve in SEARCHED_CURVES
                   for similarity in _SIMILARITIES[variant.selection])


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

    @classmethod
    def of(cls, variant: Variant, amounts: Tensor, similarity: Tensor, curves: tuple[str, ...]) -> TunedSetting:
        """amounts, similarity: float32 (H,)."""
        name = "cdf_threshold" if variant.selection == "cdf" else "topk"
        params = SpargeParams(**{name: amounts}, similarity_threshold=similarity)
        return cls(params, curves, variant.skipped, variant.pv_dtype)

    @property
    def dense_heads(self) -> Tensor:
        """bool (H,), heads that keep every block."""
        return torch.as_tensor(self.params.amount) >= 1

    def skipping_products(self, levels: Tensor) -> TunedSetting:
        """The same with P·V thresholds; heads that keep every block keep every product too.

        levels: int64 (H,), index into `PV_THRESHOLDS`.
        """
        thresholds = torch.where(self.dense_heads, math.inf, torch.tensor(PV_THRESHOLDS)[levels])
        values = dict(self.params.items()) | {"pv_threshold": math.inf if thresholds.isinf().all() else thresholds}
        return replace(self, params=SpargeParams(**values))

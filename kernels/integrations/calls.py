"""What the integrations share: settings, which calls can go sparse, and what became of the calls."""
from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import FastPathError, SpargeParams, select_implementation, sparge_attention
from ..capability import DTYPES, MAX_HEAD_DIM
from ..inputs import IMPLEMENTATIONS, PV_DTYPES, SKIPPED, check_choice

_log = logging.getLogger(__name__)
EVERY_BLOCK = SpargeParams(topk=1.0)
SPARSE = "sparse"  # the key of the calls that went sparse in their counts; the other keys are reasons
# Reasons that a user can do something about; the others belong to how a model works.
_PROBLEMS = "no fast kernels here", "the fast kernels failed", "out of memory"


class Dense(NamedTuple):
    """Why a call stays dense: `reason` is the same for every call of a kind, `detail` describes this one."""

    reason: str
    detail: str = ""


def enumeration_member(names: Any, name: str, value: str) -> Any:
    """The member of another library's enumeration with this name and value, a new one if need be.

    Raises ValueError for a member that the library has itself.
    """
    known = names._value2member_map_.get(value) or names._member_map_.get(name)
    if known is not None:
        if not getattr(known, "is_added", False):
            raise ValueError(f"name must be none of the library's own; got {known.name!r}")
        return known
    # An enumeration takes no new members; this is what its metaclass does for each when the class is made.
    member = str.__new__(names, value) if issubclass(names, str) else object.__new__(names)
    member._name_, member._value_, member.__objclass__, member.is_added = name, value, names, True
    member._sort_order_ = len(names._member_names_)
    type.__setattr__(names, name, member)
    names._member_names_.append(name)
    names._member_map_[name] = names._value2member_map_[value] = member
    return member


@dataclass(eq=False, kw_only=True)
class SparseCalls:
    """Settings of the sparse calls of a model, and counts of all its calls.

    params: the thresholds, the same in every layer.
    min_tokens: calls with fewer queries or keys stay dense.
    skipped, pv_dtype: as in `sparge_attention`.
    impl: "auto" takes the fast kernels, and leaves calls dense where there are none, because dense attention is faster
        than the reference. "triton" and "reference" as in `sparge_attention`.
    calls: how many went sparse, and how many stayed dense for which reason.

    Raises ValueError or TypeError naming the argument, its rule and its value.
    """

    params: SpargeParams = SpargeParams()
    min_tokens: int = 2048
    skipped: str = "drop"
    pv_dtype: str = "auto"
    impl: str = "auto"
    calls: Counter[str] = field(default_factory=Counter, init=False)
    # Of the latest sparse call, where it is asked for: the mean share of blocks that each head kept, float32 (H,).
    with_kept: bool = field(default=False, init=False)
    kept: Tensor | None = field(default=None, init=False)

    def __post_init__(self):
        if not isinstance(self.params, SpargeParams):
            raise TypeError(f"params must be SpargeParams; got {type(self.params).__name__}")
        self._check_count("min_tokens")
        check_choice("skipped", self.skipped, SKIPPED)
        check_choice("pv_dtype", self.pv_dtype, PV_DTYPES)
        check_choice("impl", self.impl, IMPLEMENTATIONS)

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an integer ≥ 0; got {value!r}")

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Dense | None:
        """Why q (B, H, Nq, D), k and v (B, Hkv, Nk, D) can't go sparse, as far as their mask does not matter."""
        if dropout:
            return Dense("dropout", f"{dropout}")
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return Dense("gradients are needed")
        if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
            return Dense("unsupported dtype", f"{q.dtype}, {k.dtype}, {v.dtype}")
        if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[3] > MAX_HEAD_DIM:
            return Dense("unsupported shapes", f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
        if q.shape[1] % k.shape[1] or self.params.heads not in (None, q.shape[1]):
            return Dense("unsupported numbers of heads",
                         f"{q.shape[1]} of q, {k.shape[1]} of k, thresholds for {self.params.heads or 'all'}")
        if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
            return Dense("unsupported scaling", f"{scale}")
        if self.impl == "auto":
            chosen, reason = select_implementation(q)
            if chosen == "reference":
                return Dense("no fast kernels here", reason or "")
        return None

    def attempt(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        """`sparge_attention` with these settings, or why there is no result after all: a `Dense`."""
        settings = dict(params=self.params, skipped=self.skipped, pv_dtype=self.pv_dtype,
                        impl="triton" if self.impl == "auto" else self.impl, return_stats=self.with_kept)
        self.kept = None
        try:
            result = sparge_attention(q, k, v, **settings | call)
        # A traceback holds the tensors of what failed, so the dense call comes after these except clauses.
        except FastPathError as error:
            return Dense("the fast kernels failed", str(error))
        except torch.OutOfMemoryError:
            return Dense("out of memory", f"q {tuple(q.shape)}")
        if not self.with_kept:
            return result
        out, stats, *lse = result
        self.kept = stats.kept.mean(0)
        return (out, *lse) if lse else out

    def count(self, what: Dense | None = None) -> None:
        """Count a call, a sparse one without a reason; log the first one of each reason."""
        if torch.compiler.is_compiling():
            return
        if what is not None and what.reason not in self.calls:
            level = logging.WARNING if what.reason in _PROBLEMS else logging.INFO
            detail = f" ({what.detail})" if what.detail else ""
            _log.log(level, "SpargeAttn: attention stays dense: %s%s", what.reason, detail)
        self.calls[SPARSE if what is None else what.reason] += 1

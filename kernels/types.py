"""The values of the public calls: thresholds, block maps, statistics, residuals."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .formats import INT8_MAX

Threshold = float | Tensor
TokenRanges = Sequence[tuple[int, int]]

# name -> (lower bound, whether the bound itself is allowed, upper bound)
_RANGES = {
    "cdf_threshold": (0.0, False, 1.0),
    "topk": (0.0, False, 1.0),
    "similarity_threshold": (-1.0, True, 1.0),
    "pv_threshold": (0.0, True, math.inf),
}
_DEFAULT_CDF = 0.99


def _rule(name: str) -> str:
    low, closed, high = _RANGES[name]
    interval = f"{'[' if closed else '('}{low:g}, {high:g}]"
    return f"{name} must be a number or a 1-D tensor of one number a head, in {interval}"


def _check_kind(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.numel() == 0 or not value.is_floating_point():
            raise ValueError(f"{_rule(name)}; got a {value.dtype} tensor of shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{_rule(name)}; got {type(value).__name__}")


def _check_range(name: str, value: Threshold) -> None:
    low, closed, high = _RANGES[name]
    smallest = largest = value
    if isinstance(value, Tensor):
        smallest, largest = value.min().item(), value.max().item()  # NaN makes both NaN
    if not (largest <= high and (smallest >= low if closed else smallest > low)):
        raise ValueError(f"{_rule(name)}; got {smallest:g}" + ("" if smallest == largest else f" … {largest:g}"))


@dataclass(frozen=True, eq=False)
class SpargeParams:
    """The thresholds of SpargeAttn, each a number or a floating tensor of shape (H,), one value a query head.

    Exactly one of `cdf_threshold` and `topk` selects the blocks; with neither, `cdf_threshold` is 0.99.

    cdf_threshold: τ in (0, 1]. A row of the block map keeps its largest predicted probabilities until their sum
        reaches τ (the authors' `cdfthreshd`). 1 keeps every block.
    topk: fraction in (0, 1] of the blocks of a row that is kept (the authors' `topk`), rounded up: a fixed share for
        every input. Sinks and blocks on the causal diagonal come on top.
    similarity_threshold: θ in [-1, 1], for `cdf_threshold`; `topk` does not use it. A block whose rows have a mean
        pairwise cosine below θ is badly described by its mean and is always computed (the authors' `simthreshd1`).
        Values ≤ 0 switch this judge off.
    pv_threshold: -λ ≥ 0, in log2 units. A group of rows skips P·V of a block where all its probabilities are below
        2^-pv_threshold of the running maximum (the authors' `pvthreshd`). `math.inf` switches the test off.

    numbers: amount, similarity_threshold and pv_threshold where they are the same for all heads. Otherwise zeros, but
        for a pv_threshold of infinity, which switches the λ test off for all heads.
    per_head: float32 (3, H), the same three by query head, on the device of the first tensor among them; None where
        `numbers` holds.

    Source: SpargeAttn (arXiv 2502.18137), sections 3.3-3.5. Raises ValueError or TypeError for values out of range
    and for NaN; the check of a GPU tensor waits for the device once, here, and never on the call path.
    """

    cdf_threshold: Threshold | None = None
    topk: Threshold | None = None
    similarity_threshold: Threshold = 0.5
    pv_threshold: Threshold = math.inf
    numbers: tuple[float, float, float] = field(init=False, repr=False)
    per_head: Tensor | None = field(init=False, repr=False)

    def __post_init__(self):
        if self.cdf_threshold is not None and self.topk is not None:
            raise ValueError("cdf_threshold and topk exclude each other; "
                             f"got cdf_threshold={self.cdf_threshold} and topk={self.topk}")
        if self.cdf_threshold is None and self.topk is None:
            object.__setattr__(self, "cdf_threshold", _DEFAULT_CDF)
        for name, value in self.items():
            _check_kind(name, value)
        sizes = {name: len(value) for name, value in self.items() if isinstance(value, Tensor)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"per-head thresholds must have one length; got {sizes}")
        numbers, per_head = self._packed()
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "per_head", per_head)
        for name, value in self.items():  # waits for the device, after which `per_head` is there for all streams
            _check_range(name, value)

    def _packed(self) -> tuple[tuple[float, float, float], Tensor | None]:
        values = self.amount, self.similarity_threshold, self.pv_threshold
        tensors = [x for x in values if isinstance(x, Tensor)]
        if not tensors:
            amount, similarity, pv = values
            return (float(amount), float(similarity), float(pv)), None
        first, pv = tensors[0], self.pv_threshold
        never_skips = not isinstance(pv, Tensor) and pv == math.inf
        rows = [x.to(first.device, torch.float32) if isinstance(x, Tensor) else
                torch.full((len(first),), x, device=first.device) for x in values]
        return (0.0, 0.0, math.inf if never_skips else 0.0), torch.stack(rows)

    def items(self) -> list[tuple[str, Threshold]]:
        """(name, value) of the three thresholds that are in use."""
        return [("cdf_threshold" if self.topk is None else "topk", self.amount),
                ("similarity_threshold", self.similarity_threshold), ("pv_threshold", self.pv_threshold)]

    @property
    def selection(self) -> str:
        """'topk' or 'cdf'."""
        return "cdf" if self.topk is None else "topk"

    @property
    def amount(self) -> Threshold:
        """The threshold of the chosen selection."""
        amount = self.cdf_threshold if self.topk is None else self.topk
        return _DEFAULT_CDF if amount is None else amount

    @property
    def heads(self) -> int | None:
        """Number of heads the thresholds are given for, None where all are plain numbers."""
        return None if self.per_head is None else self.per_head.shape[1]

    def to(self, device: torch.device | str) -> SpargeParams:
        """The same parameters with their tensors on `device`."""
        return SpargeParams(**{name: value.to(device) if isinstance(value, Tensor) else value
                               for name, value in self.items()})


@dataclass(frozen=True)
class BlockShape:
    """Rows of Q (`q`) and of K and V (`k`) in one block of the map."""

    q: int
    k: int

    def counts(self, q_tokens: int, k_tokens: int) -> tuple[int, int]:
        """Number of query and key blocks of a call."""
        return -(-q_tokens // self.q), -(-k_tokens // self.k)


@dataclass(frozen=True)
class BlockMap:
    """Which key blocks each query block attends, as lists.

    indices: int32 (B, H, q_blocks, k_blocks); the first `counts` entries of a row are ascending key block numbers, the
        rest is undefined.
    counts: int32 (B, H, q_blocks).
    block: the block shape in tokens, in the order used for blocking.
    """

    indices: Tensor
    counts: Tensor
    block: BlockShape

    @classmethod
    def from_mask(cls, mask: Tensor, block: BlockShape) -> BlockMap:
        """Lists from a bool mask (B, H, q_blocks, k_blocks)."""
        indices = torch.argsort(mask.logical_not(), dim=-1, stable=True).to(torch.int32)
        return cls(indices, mask.sum(-1, dtype=torch.int32), block)

    def mask(self) -> Tensor:
        """The map as bool (B, H, q_blocks, k_blocks)."""
        k_blocks = self.indices.shape[-1]
        listed = torch.arange(k_blocks, device=self.counts.device) < self.counts[..., None]
        mask = torch.zeros(*self.indices.shape[:-1], k_blocks + 1, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, torch.where(listed, self.indices, k_blocks).long(), True)[..., :k_blocks]


@dataclass(frozen=True)
class SpargeStats:
    """What a call computed, as device tensors (reading them is the caller's synchronisation).

    kept: float32 (B, H), attended block pairs over the pairs that dense attention would compute.
    pv_skipped: float32 (B, H), share of (row group, attended block) pairs whose P·V the λ test skipped.
    """

    kept: Tensor
    pv_skipped: Tensor

    @property
    def sparsity(self) -> Tensor:
        """float32 (B, H), the share of block pairs that was not attended."""
        return 1 - self.kept


@dataclass(frozen=True, eq=False)
class Residual:
    """What dense attention has beyond sparse attention of the same q, k and v, in INT8 with a scale for each row.

    quantised: int8 (B, H, Nq, D), tokens in the caller's order.
    scale: float32 (B, H, Nq).

    Both are contiguous, or the same batch entries and heads of tensors that are.
    """

    quantised: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device) -> Residual:
        """Memory for a residual of attention of `shape` (B, H, Nq, D)."""
        return cls(torch.empty(tuple(shape), dtype=torch.int8, device=device),
                   torch.empty(tuple(shape[:3]), dtype=torch.float32, device=device))

    @classmethod
    def of(cls, difference: Tensor) -> Residual:
        """The residual of dense - sparse, floating (B, H, Nq, D); zero where that is not finite."""
        difference = difference.float()
        difference = difference.where(difference.isfinite(), 0.0)
        scale = torch.linalg.vector_norm(difference, math.inf, -1).div_(INT8_MAX)
        rounded = difference.div_(scale.clamp(min=1e-30)[..., None]).round_()
        return cls(rounded.to(torch.int8).contiguous(), scale.contiguous())

    @property
    def rows_a_batch(self) -> int:
        """Rows from one batch entry to the next."""
        return self.scale.stride(0)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self.quantised.nbytes + self.scale.nbytes

    def tensor(self) -> Tensor:
        """The difference, float32 (B, H, Nq, D)."""
        return self.quantised * self.scale[..., None]

    def contiguous(self) -> Residual:
        """The same in memory without gaps."""
        return Residual(self.quantised.contiguous(), self.scale.contiguous())

    def batch(self, first: int, last: int) -> Residual:
        """The residual of the batch entries `first` to `last`, in the same memory."""
        return Residual(self.quantised[first:last], self.scale[first:last])

    def heads(self, first: int, last: int) -> Residual:
        """The residual of the heads `first` to `last`, in the same memory."""
        return Residual(self.quantised[:, first:last], self.scale[:, first:last])

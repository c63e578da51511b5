"""What a call is beside its tensors q, k and v: one object that every implementation takes."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import HIDDEN, LOG2E
from .types import BlockShape, Residual, SpargeParams, Threshold, TokenRanges

NEARLY_ALL = 0.999  # cdf_threshold from which on number formats cost more than what is skipped


@dataclass(frozen=True, eq=False)
class Thresholds:
    """`SpargeParams` in the form that the kernels read.

    selection: "cdf" or "topk".
    numbers, per_head: as of `SpargeParams`, on the device of the call.
    """

    selection: str
    numbers: tuple[float, float, float]
    per_head: Tensor | None = None

    @classmethod
    def of(cls, params: SpargeParams, device: torch.device) -> Thresholds:
        """The thresholds for a call on `device`. Does not wait for the device where they are there."""
        per_head = params.per_head
        return cls(params.selection, params.numbers, None if per_head is None else per_head.to(device))

    @property
    def amount(self) -> Threshold:
        """τ or the share of TopK: a number, or float32 (H,)."""
        return self.numbers[0] if self.per_head is None else self.per_head[0]

    @property
    def similarity_threshold(self) -> Threshold:
        """θ: a number, or float32 (H,)."""
        return self.numbers[1] if self.per_head is None else self.per_head[1]

    @property
    def pv_threshold(self) -> Threshold:
        """-λ in log2 units: a number, or float32 (H,)."""
        return self.numbers[2] if self.per_head is None else self.per_head[2]


@dataclass(frozen=True, eq=False)
class CallSpec:
    """A checked call, heads before tokens. The fields are the arguments of the public calls, but for

    thresholds: `params`, packed.
    block_mask: bool (B or 1, H or 1, q_blocks, k_blocks), the map that the caller gives; None predicts one.
    mask_block: the block shape that `block_mask` was made for, None where the caller did not say.
    residual: also the earlier one from which another one is extrapolated, with its `lead`.
    form: under which its launches are recorded, see _triton/replay.py; None where they are not.
    """

    thresholds: Thresholds
    scale: float | None = None
    causal: bool = False
    key_padding_mask: Tensor | None = None
    key_bias: Tensor | None = None
    order: Tensor | None = None
    sink_keys: TokenRanges | None = None
    dense_queries: TokenRanges | None = None
    pv_dtype: str = "auto"
    skipped: str = "drop"
    return_stats: bool = False
    return_lse: bool = False
    block_mask: Tensor | None = None
    mask_block: BlockShape | None = None
    residual: Residual | None = None
    lead: float = 0.0
    form: tuple | None = None

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        """The tensors of the call in the order in which its form has them."""
        return inputs_of(q, k, v, self.order, self.key_padding_mask, self.thresholds.per_head, self.residual)

    @property
    def pooled(self) -> bool:
        """Whether skipped blocks contribute one pooled key and value each."""
        return self.skipped == "pooled"

    @property
    def keeps_nearly_all(self) -> bool:
        """Whether the thresholds keep every block, or all but a thousandth of the predicted attention, whatever q and k
        are: number formats make most of the error then."""
        if self.block_mask is not None or self.thresholds.per_head is not None:
            return False
        return self.thresholds.numbers[0] >= (NEARLY_ALL if self.thresholds.selection == "cdf" else 1)

    @property
    def judges_similarity(self) -> bool:
        """Whether a block may be kept because its tokens are too unlike each other. No similarity lies below -1."""
        if self.block_mask is not None or self.thresholds.selection != "cdf":
            return False
        return self.thresholds.per_head is not None or self.thresholds.numbers[1] > -1

    def mixing_groups(self, head_dim: int) -> int:
        """The groups of neighbouring channels of Q and K that are mixed before they are rounded to INT8; 1 for none.

        The scores of trained models then have 0.6 to 0.9 × the error. It takes 1% of a call that keeps every block, 2%
        of one that keeps 0.999 of the attention, and 6% of one that keeps a tenth of the blocks, which loses more by
        what it skips. Only where channels fill up registers, which have a power of two: zeros would become numbers to
        store.
        """
        return 8 if self.keeps_nearly_all and head_dim >= 32 and head_dim & (head_dim - 1) == 0 else 1

    def scale_for(self, head_dim: int) -> float:
        """The factor on QKᵀ."""
        return head_dim ** -0.5 if self.scale is None else self.scale

    def bias_and_padding(self) -> tuple[Tensor | None, Tensor | None]:
        """The bias of keys, float32 (B, Nk) in log2 units with 0 as a row's largest, and bool (B, Nk), keys to ignore.

        Each is None where the call has no such thing.
        """
        if self.key_bias is None:
            return None, self.key_padding_mask
        return centred_bias(self.key_bias.float(), self.key_padding_mask, self.causal)

    def shared_score(self, q: Tensor, centre: Tensor) -> Tensor:
        """What implementations leave out of all scores of a row, because softmax ignores it: (B, H, Nq).

        q: (B, H, Nq, D). centre: (B, H, D), float32 or wider, subtracted from every key.
        """
        # Head by head: a copy of all heads in float32 would be as large as q, k and v.
        shared = torch.stack([(q[:, head].to(centre.dtype) @ centre[:, head, :, None])[..., 0]
                              for head in range(q.shape[1])], 1) * self.scale_for(q.shape[-1])
        if self.key_bias is not None:
            shared += largest_bias(self.key_bias.float(), self.key_padding_mask)[:, None]
        return shared

    def check_blocks(self, block: BlockShape, q_tokens: int, k_tokens: int) -> None:
        """Raise ValueError where the given map is not made of the blocks that the implementation works in."""
        if self.block_mask is None:
            return
        if self.mask_block not in (None, block):
            raise ValueError(f"block_map must have this call's blocks, {block}; got {self.mask_block}")
        counts = block.counts(q_tokens, k_tokens)
        if tuple(self.block_mask.shape[2:]) != counts:
            raise ValueError(f"block_map must have {counts} blocks of {block} in its last dimensions; "
                             f"got shape {tuple(self.block_mask.shape)}")

    def heads(self, first: int, last: int, group: int) -> CallSpec:
        """The call of the heads `first` to `last` of K, each of which serves `group` heads of Q."""
        of_queries = slice(first * group, last * group)
        order, mask, per_head, residual = self.order, self.block_mask, self.thresholds.per_head, self.residual
        if per_head is not None:
            per_head = per_head[:, of_queries].contiguous()
        if order is not None and order.ndim == 2:
            order = order[first:last]
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, of_queries]
        if residual is not None:
            residual = residual.heads(of_queries.start, of_queries.stop)
        return replace(self, thresholds=replace(self.thresholds, per_head=per_head), order=order, block_mask=mask,
                       residual=residual)


def inputs_of(q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, padding: Tensor | None, per_head: Tensor | None,
              residual: Residual | None) -> tuple[Tensor | None, ...]:
    """The tensors of a call whose launches may be repeated."""
    quantised, scale = (None, None) if residual is None else (residual.quantised, residual.scale)
    return q, k, v, order, padding, per_head, quantised, scale


def largest_bias(bias: Tensor, padding: Tensor | None) -> Tensor:
    """The largest bias (B, 1) of the keys (B, N) of a row."""
    seen = bias if padding is None else bias.masked_fill(padding, -math.inf)
    return seen.amax(1, keepdim=True).clamp(min=torch.finfo(bias.dtype).min)


def centred_bias(bias: Tensor, padding: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The bias of keys (B, N) in log2 units with 0 as the largest of a row, and bool (B, N), which keys to ignore.

    Softmax ignores what all keys of a row share. A query of causal attention may see none of the largest biases, so
    that only keys at minus infinity are ignored there.
    """
    bias = (bias - largest_bias(bias, padding)) * LOG2E
    hidden = bias == -math.inf if causal else bias <= HIDDEN
    return bias, hidden if padding is None else hidden | padding

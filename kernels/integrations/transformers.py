"""SpargeAttn as an attention implementation of Hugging Face transformers, 4.53 and newer.

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="spargeattn")

Long prompts go sparse. Decode steps, and whatever the kernels don't compute, go to transformers' own sdpa as they came.
"""
from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import FastPathError, SpargeParams, SpargeStats, select_implementation, sparge_attention
from ..capability import DTYPES, MAX_HEAD_DIM, arch_of, supports_fp8
from ..inputs import IMPLEMENTATIONS, PV_DTYPES, SKIPPED, check_choice

_log = logging.getLogger(__name__)

# What some models and versions hand to attention, and `sparge_attention` has not.
_DENSE_IF_GIVEN = {"softcap": "soft cap", "position_bias": "position bias", "head_mask": "head mask",
                   "output_attentions": "attention maps are wanted"}
# Reasons that a user can do something about; the others belong to how a model works.
_PROBLEMS = "no fast kernels here", "pv_dtype fp8 is not supported here", "the fast kernels failed", "out of memory"
_ROWS = 1024  # of a mask are compared at a time: all at once would take several times the memory of a long mask


def register(name: str = "spargeattn", **settings) -> SpargeAttention:
    """Offer `SpargeAttention(**settings)` to transformers as attn_implementation=name, in place of an earlier one of
    that name. Raises ImportError where transformers is missing or older than 4.53."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(f"this needs transformers 4.53 or newer: {error}") from error
    attention = SpargeAttention(sdpa_attention_forward, **settings)
    AttentionInterface.register(name, attention)
    # An implementation without a mask function of its own gets no mask at all, not even for padding.
    AttentionMaskInterface.register(name, sdpa_mask)
    return attention


@dataclass(eq=False)
class SpargeAttention:
    """The attention function of a model's layers. For inference: calls that need gradients stay dense.

    Sparse: causal and full attention, grouped heads, padding at either side. What stays dense is counted in `calls`
    and logged once a reason.

    dense: transformers' sdpa_attention_forward, for the other calls.
    params: the thresholds, the same in every layer.
    min_tokens: calls with fewer queries or keys stay dense.
    sink_tokens: so many first tokens of each sequence are attended by all later ones, in whole blocks.
    last_tokens: so many last tokens of each sequence attend everything before them, in whole blocks; the answer to a
        prompt is written from its last token.
    dense_layers: numbers of layers that stay dense.
    skipped, pv_dtype: as in `sparge_attention`.
    impl: "auto" takes the fast kernels, and leaves calls dense where there are none, because sdpa is faster than the
        reference. "triton" and "reference" as in `sparge_attention`.
    on_stats: called after each sparse call with the layer's module and the call's `SpargeStats`.

    Raises ValueError or TypeError naming the argument, its rule and its value.
    """

    dense: Callable[..., tuple[Tensor, Any]]
    _: KW_ONLY
    params: SpargeParams = SpargeParams()
    min_tokens: int = 2048
    sink_tokens: int = 4
    last_tokens: int = 1
    dense_layers: Collection[int] = ()
    skipped: str = "drop"
    pv_dtype: str = "auto"
    impl: str = "auto"
    on_stats: Callable[[torch.nn.Module, SpargeStats], None] | None = None
    calls: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self):
        if not isinstance(self.params, SpargeParams):
            raise TypeError(f"params must be SpargeParams; got {type(self.params).__name__}")
        for name in ("min_tokens", "sink_tokens", "last_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer ≥ 0; got {value!r}")
        check_choice("skipped", self.skipped, SKIPPED)
        check_choice("pv_dtype", self.pv_dtype, PV_DTYPES)
        check_choice("impl", self.impl, IMPLEMENTATIONS)
        # All layers of a forward pass get the same mask, or one of two.
        self._read = WeakTensorKeyDictionary()

    def __call__(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                 attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                 is_causal: bool | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention of query (B, H, Nq, D), key and value (B, Hkv, Nk, D) → (B, Nq, H, D), and None for its map."""
        _refuse(attention_mask, kwargs)
        why = self._stays_dense(module, query, key, value, dropout, scaling, kwargs)
        if why is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            out = self._sparse(module, query, key, value, attention_mask, scaling, causal, kwargs)
            if isinstance(out, Tensor):
                return out, None
            why = out
        self._count(*why)
        return self.dense(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                          is_causal=is_causal, **kwargs)

    def _stays_dense(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, dropout: float,
                     scaling: float | None, kwargs: dict[str, Any]) -> Dense | None:
        """Why a call stays dense, as far as its mask does not matter."""
        q_tokens, k_tokens = q.shape[2], k.shape[2]
        if q_tokens == 1:
            return Dense("decode step")
        if min(q_tokens, k_tokens) < self.min_tokens:
            return Dense("fewer tokens than min_tokens", f"{min(q_tokens, k_tokens)} < {self.min_tokens}")
        if self.dense_layers and getattr(module, "layer_idx", None) in self.dense_layers:
            return Dense("listed in dense_layers")
        for name, reason in _DENSE_IF_GIVEN.items():
            if kwargs.get(name) is not None and kwargs[name] is not False:
                return Dense(reason)
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
        if scaling is not None and not (isinstance(scaling, (int, float)) and math.isfinite(scaling)):
            return Dense("unsupported scaling", f"{scaling}")
        if self.impl == "auto":
            chosen, reason = select_implementation(q)
            if chosen == "reference":
                return Dense("no fast kernels here", reason or "")
        if self.pv_dtype == "fp8" and self.impl != "reference" and not supports_fp8(arch_of(q.device)):
            return Dense("pv_dtype fp8 is not supported here", "choose auto or fp16")
        return None

    def _sparse(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                scaling: float | None, causal: bool, kwargs: dict[str, Any]) -> Tensor | Dense:
        """The result, or why there is none after all."""
        q_tokens, k_tokens = q.shape[2], k.shape[2]
        seen = KeyMask(causal, None, ((0, q_tokens if causal else k_tokens),))
        if mask is not None:
            if torch.compiler.is_compiling():
                return Dense("a mask can't be read under torch.compile")
            seen = self._seen(mask, q_tokens, k_tokens)
            if seen is None:
                windowed = kwargs.get("sliding_window") is not None
                return Dense("sliding window" if windowed else "mask is neither causal nor by key",
                             f"{q_tokens} queries, {k_tokens} keys")
        padding = None if seen.padding is None else seen.padding.expand(q.shape[0], -1)
        try:
            result = sparge_attention(
                q, k, v, params=self.params, scale=scaling, causal=seen.causal, key_padding_mask=padding,
                sink_keys=_ranges(((start, start + self.sink_tokens) for start, _ in seen.spans), k_tokens),
                dense_queries=_ranges(((stop - self.last_tokens, stop) for _, stop in seen.spans), q_tokens),
                skipped=self.skipped, pv_dtype=self.pv_dtype, impl="triton" if self.impl == "auto" else self.impl,
                return_stats=self.on_stats is not None)
        # A traceback holds the tensors of what failed, so the dense call comes after these except clauses.
        except FastPathError as error:
            return Dense("the fast kernels failed", str(error))
        except torch.OutOfMemoryError:
            return Dense("out of memory", f"{q_tokens} tokens")
        self._count("sparse")
        if not isinstance(result, Tensor):
            result, stats = result
            if self.on_stats is not None:
                self.on_stats(module, stats)
        return result.transpose(1, 2).contiguous()

    def _seen(self, mask: Tensor, q_tokens: int, k_tokens: int) -> KeyMask | None:
        """`read_mask`, remembered as long as the mask lives and stays what it is."""
        state = q_tokens, k_tokens, None if mask.is_inference() else mask._version
        known = self._read.get(mask)
        if known is None or known[0] != state:
            known = self._read[mask] = state, read_mask(mask, q_tokens, k_tokens)
        return known[1]

    def _count(self, what: str, detail: str = "") -> None:
        if torch.compiler.is_compiling():
            return
        if what != "sparse" and what not in self.calls:
            level = logging.WARNING if what in _PROBLEMS else logging.INFO
            _log.log(level, "SpargeAttn: attention stays dense: %s%s", what, f" ({detail})" if detail else "")
        self.calls[what] += 1


class Dense(NamedTuple):
    """Why a call stays dense: `reason` is the same for every call of a kind, `detail` describes this one."""

    reason: str
    detail: str = ""


class KeyMask(NamedTuple):
    """What a mask allows.

    causal: query i attends keys j ≤ i alone.
    padding: bool (B or 1, Nk), True where no query attends the key; None where there is no padding.
    spans: the first token of each sequence of the batch and the end of its last.
    """

    causal: bool
    padding: Tensor | None
    spans: tuple[tuple[int, int], ...]


def read_mask(mask: Tensor, q_tokens: int, k_tokens: int) -> KeyMask | None:
    """What a mask (B or 1, 1, Nq, ≥ Nk) allows, where it is causal or full attention less the padding; None elsewhere.

    mask: bool, True where a query attends a key, or floating, 0 there and the least number elsewhere. Queries without
    any key may have all of them, as some versions write it: they are padding, and nobody reads their output.

    Waits for the device once.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != q_tokens or mask.shape[3] < k_tokens:
        return None
    mask = mask[:, 0, :, :k_tokens]
    keys = torch.arange(k_tokens, device=mask.device)
    exists = _attended(mask[:, -1])  # the last query attends every key that any query attends
    fits_causal = fits_full = torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, q_tokens, _ROWS):
        rows = mask[:, start:start + _ROWS]
        attended = _attended(rows)
        if rows.is_floating_point():
            plain = (attended | (rows <= torch.finfo(rows.dtype).min)).all()
            fits_causal, fits_full = fits_causal & plain, fits_full & plain
        full = exists[:, None]
        causal = full & (keys <= start + torch.arange(rows.shape[1], device=mask.device)[:, None])
        everything = attended.all(-1, keepdim=True)
        fits_causal = fits_causal & ((attended == causal) | (everything & ~causal.any(-1, keepdim=True))).all()
        fits_full = fits_full & (attended == full).all()
    first = exists.int().argmax(-1)
    stop = k_tokens - exists.flip(-1).int().argmax(-1)
    is_causal, is_full, unpadded, *ends = torch.cat(
        [torch.stack([fits_causal, fits_full, exists.all()]).long(), first, stop]).tolist()
    if not (is_causal or is_full):
        return None
    spans = tuple(zip(ends[:len(ends) // 2], ends[len(ends) // 2:]))
    return KeyMask(bool(is_causal), None if unpadded else ~exists, spans)


def _attended(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _ranges(ranges: Iterable[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """Each range once and within the tokens, empty ones left out."""
    clipped = {(max(start, 0), min(stop, tokens)) for start, stop in ranges}
    return sorted((start, stop) for start, stop in clipped if start < stop)


def _refuse(mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise where sdpa would give another result than the model means."""
    for name in ("s_aux", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None, because neither SpargeAttn nor sdpa knows learned sinks; choose "
                             "attn_implementation='eager' for this model")
    if mask is None and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q must be None, because packed sequences need a mask here; choose "
                         "attn_implementation='sdpa' or flash attention for them")

"""SpargeAttn as an attention implementation of Hugging Face transformers, 4.53 and newer.

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="spargeattn")

Long prompts go sparse. Decode steps, and whatever the kernels don't compute, go to transformers' own sdpa as they came.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import SpargeStats
from .calls import Dense, SparseCalls

# What some models and versions hand to attention, and `sparge_attention` has not.
_DENSE_IF_GIVEN = {"softcap": "soft cap", "position_bias": "position bias", "head_mask": "head mask",
                   "output_attentions": "attention maps are wanted"}
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
class SpargeAttention(SparseCalls):
    """The attention function of a model's layers. For inference: calls that need gradients stay dense.

    Sparse: causal and full attention, grouped heads, padding at either side. What stays dense is counted in `calls`
    and logged once a reason.

    dense: transformers' sdpa_attention_forward, for the other calls.
    sink_tokens: so many first tokens of each sequence are attended by all later ones, in whole blocks.
    last_tokens: so many last tokens of each sequence attend everything before them, in whole blocks; the answer to a
        prompt is written from its last token.
    dense_layers: numbers of layers that stay dense.
    on_stats: called after each sparse call with the layer's module and the call's `SpargeStats`.

    The other settings and the errors are those of `SparseCalls`.
    """

    dense: Callable[..., tuple[Tensor, Any]]
    _: KW_ONLY
    sink_tokens: int = 4
    last_tokens: int = 1
    dense_layers: Collection[int] = ()
    on_stats: Callable[[torch.nn.Module, SpargeStats], None] | None = None

    def __post_init__(self):
        super().__post_init__()
        self._check_count("sink_tokens")
        self._check_count("last_tokens")
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
        self.count(why)
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
        return self.unsupported(q, k, v, scaling, dropout)

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
        result = self.attempt(
            q, k, v, scale=scaling, causal=seen.causal, key_padding_mask=padding,
            sink_keys=_ranges(((start, start + self.sink_tokens) for start, _ in seen.spans), k_tokens),
            dense_queries=_ranges(((stop - self.last_tokens, stop) for _, stop in seen.spans), q_tokens),
            return_stats=self.on_stats is not None)
        if isinstance(result, Dense):
            return result
        self.count()
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

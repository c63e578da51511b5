"""SpargeAttn as an attention backend of Hugging Face diffusers, 0.36 and newer, on one device or on several.

    register()
    pipe.transformer.set_attention_backend("spargeattn")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # on two GPUs

Long self-attention goes sparse. Cross-attention, short sequences, and whatever the kernels don't compute go to
diffusers' native backend as they came. With context parallelism diffusers splits the sequence and moves the tensors:
by heads (Ulysses) or by keys (ring), which merges parts by their log-sum-exp. `register(layers=30)`, for a model of 30
layers, spreads the heads over the devices by what they cost the step before (`head_balance.py`).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import SpargeParams, sparge_attention
from .calls import EVERY_BLOCK, Dense, SparseCalls, enumeration_member
from .head_balance import HeadBalance


def register(name: str = "spargeattn", **settings) -> SpargeBackend:
    """Offer `SpargeBackend(**settings)` to diffusers as the attention backend `name`, in place of an earlier one of
    that name.

    name: in lower case, none of diffusers' own. Raises ImportError where diffusers is missing or older than 0.36.
    """
    try:
        from diffusers.models import attention_dispatch
        names, registry = attention_dispatch.AttentionBackendName, attention_dispatch._AttentionBackendRegistry
        in_parallel = attention_dispatch._templated_context_parallel_attention
        native = registry._backends[names.NATIVE]
    except (ImportError, AttributeError) as error:
        raise ImportError(f"this needs diffusers 0.36 or newer: {error}") from error
    if not isinstance(name, str) or name != name.lower() or not name:
        raise ValueError(f"name must be a word in lower case; got {name!r}")
    backend = SpargeBackend(native, in_parallel, **settings)
    registry.register(enumeration_member(names, name.upper(), name), supports_context_parallel=True)(backend)
    return backend


@dataclass(eq=False)
class SpargeBackend(SparseCalls):
    """The attention function of a model's layers. For inference: calls that need gradients stay dense.

    Sparse: self-attention, with masks by key, causal or not, grouped heads. What stays dense is counted in `calls` and
    logged once a reason. With ring attention, dense calls keep every block instead, because diffusers' native backend
    has no log-sum-exp; each part of the keys is selected from by itself.

    dense: diffusers' native backend, for the other calls.
    in_parallel: diffusers' attention over several devices, which calls back for the work of this one.
    layers: sparse calls of one evaluation of the model, whose heads are then spread over the devices of Ulysses by
        their costs; 0 leaves them where they are. Not with a ring.

    The settings and the errors are those of `SparseCalls`; min_tokens counts the tokens of all devices.
    """

    dense: Callable[..., Tensor]
    in_parallel: Callable[..., Any]
    _: KW_ONLY
    layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_count("layers")
        self.balance = HeadBalance(self.layers) if self.layers else None
        self.with_kept = self.balance is not None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                 enable_gqa: bool = False, return_lse: bool = False,
                 _parallel_config: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of query (B, Nq, H, D), key and value (B, Nk, Hkv, D) → like query, with return_lse also the
        log-sum-exp, float32 (B, Nq, H)."""
        call = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
        split = getattr(_parallel_config, "context_parallel_config", None)
        ring = split is not None and split.ring_degree > 1
        devices = 1 if split is None else split.ring_degree * split.ulysses_degree
        why = self._stays_dense(query, key, value, attn_mask, dropout_p, scale, devices, ring)
        if why is None or ring:
            params = self.params if why is None else EVERY_BLOCK
            if split is not None:
                self.count(why)
                return self._on_all_devices(params, split, *call, _parallel_config=_parallel_config)
            out = self.attend(params, *call)
            if not isinstance(out, Dense):
                self.count(why)
                return out
            why = out
        self.count(why)
        return self.dense(*call, _parallel_config=_parallel_config)

    def _on_all_devices(self, params: SpargeParams, split: Any, query: Tensor, key: Tensor, value: Tensor,
                        *call: Any, _parallel_config: Any) -> Tensor | tuple[Tensor, Tensor]:
        """A call by diffusers' attention over several devices, its heads spread over them if that is asked for."""
        places = None
        if self.balance is not None and split.ring_degree == 1:
            places = self.balance.places(key, split._ulysses_mesh.get_group())
        if places is not None:
            query, key, value = (places.there(x) for x in (query, key, value))
        self.kept = None
        result = self.in_parallel(query, key, value, *call, forward_op=_Forward(self, params),
                                  backward_op=_no_gradients, _parallel_config=_parallel_config)
        if places is None:
            return result
        places.gather(self.kept, query.device)
        return tuple(places.back(x) for x in result) if isinstance(result, tuple) else places.back(result)

    def _stays_dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
                     scale: float | None, devices: int, ring: bool) -> Dense | None:
        q_tokens, k_tokens = query.shape[1] * devices, key.shape[1] * devices
        if q_tokens != k_tokens:
            return Dense("cross-attention", f"{q_tokens} queries, {k_tokens} keys")
        if q_tokens < self.min_tokens:
            return Dense("fewer tokens than min_tokens", f"{q_tokens} < {self.min_tokens}")
        if mask is not None and (ring or _by_key(mask, len(query), k_tokens) is None):
            return Dense("mask is not by key", f"{tuple(mask.shape)}")
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return self.unsupported(*heads_first, scale, dropout)

    def attend(self, params: SpargeParams, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
               dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
               return_lse: bool) -> Tensor | tuple[Tensor, Tensor] | Dense:
        """The work of one device, or why there is none after all."""
        mask = {} if attn_mask is None else _by_key(attn_mask, len(query), key.shape[1])
        result = self.attempt(query, key, value, params=params, layout="BNHD", scale=scale, causal=is_causal,
                              return_lse=return_lse, **mask or {})
        if isinstance(result, Dense) or not return_lse:
            return result
        return result[0], result[1].transpose(1, 2)


@dataclass(frozen=True)
class _Forward:
    """What diffusers calls for the work of one device."""

    backend: SpargeBackend
    params: SpargeParams

    def __call__(self, ctx: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                 enable_gqa: bool = False, return_lse: bool = False, _save_ctx: bool = True,
                 _parallel_config: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        call = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
        # Thresholds by head fit no part of the heads, and a ring comes here with calls that no kernel takes.
        why = self.backend.unsupported(*(x.transpose(1, 2) for x in (query, key, value)), scale, dropout_p)
        out = why or self.backend.attend(self.params, *call)
        if not isinstance(out, Dense):
            return out
        # The other devices wait for this one's part.
        self.backend.count(out)
        if not return_lse:
            return self.backend.dense(*call)
        out, lse = sparge_attention(query, key, value, params=EVERY_BLOCK, layout="BNHD", scale=scale,
                                    causal=is_causal, impl="reference", return_lse=True)
        return out, lse.transpose(1, 2)


def _no_gradients(*args) -> None:
    raise RuntimeError("SpargeAttn has no gradients; sample under torch.no_grad()")


def _by_key(mask: Tensor, batch: int, k_tokens: int) -> dict[str, Tensor] | None:
    """A mask of keys as `sparge_attention` takes it, None for one that is anything else.

    mask: (B, Nk), or (B or 1, 1, 1, Nk); bool, True where a key takes part, or floating, added to the scores.
    """
    if mask.ndim not in (2, 4) or mask.shape[-1] != k_tokens or (mask.ndim == 4 and mask.shape[1:3] != (1, 1)):
        return None
    if mask.shape[0] not in (1, batch) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    by_key = mask.reshape(mask.shape[0], k_tokens).expand(batch, k_tokens)
    return {"key_padding_mask": ~by_key} if mask.dtype == torch.bool else {"key_bias": by_key}

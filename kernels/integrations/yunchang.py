"""SpargeAttn inside yunchang's LongContextAttention and xDiT's xFuserLongContextAttention, which builds on it.

    attention = LongContextAttention(attn_type=ATTN_TYPE, attn_processor=SpargeProcessor())
    balance_heads(attention)

Both split a sequence over devices by heads (Ulysses), by keys (ring) or by both, move the tensors, and call the
processor for the work of one device. Parts of the keys are merged by their log-sum-exp. `balance_heads` spreads the
heads over the devices by what they cost the step before (`head_balance.py`).

A program that chooses among yunchang's own types by name, as raylight does, gets one more:

    register(layers=30)  # AttnType.SPARGEATTN, for a model whose 30 layers share one attention object

Every process calls this before it makes its attention: with raylight, at the top of its
`distributed_modules/attention.py`, which ComfyUI and the actors both import. XFuser_attention then lists SPARGEATTN.
"""
from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .. import sparge_attention
from .calls import EVERY_BLOCK, Dense, SparseCalls, enumeration_member
from .head_balance import HeadBalance

# None of yunchang's own types: it calls the processor for a type that it does not know.
ATTN_TYPE = "spargeattn"


@dataclass(eq=False, kw_only=True)
class SpargeProcessor(SparseCalls):
    """What yunchang calls for the attention of one device over one part of the keys. For inference.

    Calls that don't go sparse keep every block, because the parts are merged by a log-sum-exp that torch's own
    attention does not return; where the kernels can't take a call, the reference computes it. Both are counted in
    `calls` and logged once a reason. With a ring, each part of the keys is selected from by itself.

    The settings and the errors are those of `SparseCalls`; min_tokens counts the queries and keys of a part.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
                 causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float | None = 0.0,
                 alibi_slopes: Tensor | None = None, return_softmax: bool = False,
                 **more: Any) -> tuple[Tensor, Tensor]:
        """Attention of q (B, Nq, H, D), k and v (B, Nk, Hkv, D) → like q, and the log-sum-exp, float32 (B, H, Nq).

        Raises ValueError for a window, a soft cap or slopes, which would mean another attention.
        """
        for name, value, none in (("window_size", tuple(window_size), (-1, -1)), ("softcap", softcap or 0.0, 0.0),
                                  ("alibi_slopes", alibi_slopes, None)):
            if value is not none and value != none:
                raise ValueError(f"{name} must be {none}, because SpargeAttn has no such thing; got {value}")
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        why = self.unsupported(*heads_first, softmax_scale, dropout_p)
        how = dict(layout="BNHD", scale=softmax_scale, causal=causal, return_lse=True)
        if why is None:
            params = self.params
            if min(q.shape[1], k.shape[1]) < self.min_tokens:
                why = Dense("fewer tokens than min_tokens", f"{min(q.shape[1], k.shape[1])} < {self.min_tokens}")
                params = EVERY_BLOCK
            result = self.attempt(q, k, v, params=params, **how)
            if not isinstance(result, Dense):
                self.count(why)
                return result
            why = result
        self.count(why)
        return sparge_attention(q, k, v, params=EVERY_BLOCK, impl="reference", **how)


def balance_heads(attention: Any, layers: int = 1) -> HeadBalance:
    """Spread the heads of each call of an attention with a `SpargeProcessor` over the devices by their costs.

    attention: a LongContextAttention or one that builds on it, such as xFuserLongContextAttention. Calls with a ring,
        with thresholds by head, or whose heads of K are no multiple of the devices stay as they are.
    layers: calls of this attention in one evaluation of the model: 1 where each layer has its own, as in xDiT, and the
        number of layers where they share one, as in raylight.
    """
    balance = HeadBalance(layers)
    signature = inspect.signature(attention.forward)
    state = {}

    def before(attention, args, kwargs):
        state.clear()
        call = signature.bind(*args, **kwargs)
        processor = attention.attn_processor
        if (not isinstance(processor, SpargeProcessor) or processor.params.heads is not None
                or dist.get_world_size(attention.ring_pg) > 1):
            return None
        places = balance.places(call.arguments["key"], attention.ulysses_pg)
        if places is None:
            return None
        for name in _HEADS:
            if isinstance(call.arguments.get(name), Tensor):
                call.arguments[name] = places.there(call.arguments[name])
        processor.with_kept, processor.kept = True, None
        state["places"] = places
        return call.args, call.kwargs

    def after(attention, args, out):
        if not state:
            return None
        places = state.pop("places")
        places.gather(attention.attn_processor.kept, out.device)
        return places.back(out)

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(after)
    return balance


# Arguments that have heads. Each device takes its heads of the joint keys and values, which all devices have whole.
_HEADS = "query", "key", "value", "joint_tensor_query", "joint_tensor_key", "joint_tensor_value"


def register(name: str = "SPARGEATTN", *, layers: int = 0, **settings: Any) -> SpargeProcessor:
    """Offer `SpargeProcessor(**settings)` as a member of yunchang's AttnType, in place of an earlier one of that name.

    name: of the member; its value is the same in lower case. None of yunchang's own.
    layers: as in `balance_heads`; 0 leaves the heads where they are.

    Attention of this type that is made from here on calls the returned processor, unless it is given another. Raises
    ImportError where yunchang is missing or older than 0.6, and ValueError for a name or settings that it can't take.
    """
    try:
        from yunchang import LongContextAttention
        from yunchang.kernels import AttnType
    except ImportError as error:
        raise ImportError(f"this needs yunchang 0.6 or newer: {error}") from error
    processor = SpargeProcessor(**settings)
    if layers:
        HeadBalance(layers)  # checks the number before anything is registered
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier; got {name!r}")
    member = enumeration_member(AttnType, name, name.lower())
    registered = getattr(LongContextAttention, "_spargeattn", None)
    if registered is None:
        registered = LongContextAttention._spargeattn = {}
        LongContextAttention.__init__ = _made(LongContextAttention.__init__, registered)
    registered[member] = processor, layers
    return processor


def _made(init: Any, registered: dict) -> Any:
    """An `__init__` after which attention of a registered type has its processor."""

    @functools.wraps(init)
    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.attn_type not in registered:
            return
        processor, layers = registered[self.attn_type]

        def give(attention, args):  # xDiT's attention forgets its processor after this __init__
            if attention.attn_processor is None:
                attention.attn_processor = processor

        self.register_forward_pre_hook(give)
        if layers:
            balance_heads(self, layers)

    return made

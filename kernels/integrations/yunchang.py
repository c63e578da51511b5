"""SpargeAttn inside yunchang's LongContextAttention and xDiT's xFuserLongContextAttention, which builds on it.

    LongContextAttention(attn_type=ATTN_TYPE, attn_processor=SpargeProcessor())

Both split a sequence over devices by heads (Ulysses), by keys (ring) or by both, move the tensors, and call the
processor for the work of one device. Parts of the keys are merged by their log-sum-exp.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import sparge_attention
from .calls import EVERY_BLOCK, Dense, SparseCalls

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

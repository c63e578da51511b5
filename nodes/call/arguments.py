"""ComfyUI's attention calling convention, turned into the kernels' and back.

ComfyUI calls `override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **kwargs)`, with `heads` and what follows positional or by keyword. Tensors are
(B, L, H·D), or (B, H, L, D) with `skip_reshape`; some models pass a (B, L, H, D) tensor among (B, L, H·D) ones. The
result is (B, L, H·D), or (B, H, L, D) with `skip_output_reshape`. MiniMax-H3 hands q, k and v over in containers, of
which the call owns the tensors.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...kernels.capability import DTYPES

_POSITIONAL = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
_KEYWORDS = {*_POSITIONAL, "scale", "enable_gqa", "low_precision_attention", "transformer_options",
             "_inside_attn_wrapper"}


class UnsupportedCall(ValueError):
    """The arguments of a call do not have the form described above; dense attention has to deal with them."""


class KeyMask(TypedDict, total=False):
    """A mask of keys, (B, k_tokens), under the name by which `sparge_attention` takes it; empty where there is none."""

    key_padding_mask: Tensor
    key_bias: Tensor


def token_counts(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Tokens of q and k in the arguments that follow `func`, at a glance; None where they don't look as usual."""
    if len(args) < 2 or type(args[0]) is not Tensor or type(args[1]) is not Tensor:
        return None
    q, k = args[0].shape, args[1].shape
    if len(q) == len(k) == 3 and not kwargs.get("skip_reshape") and len(args) < _POSITIONAL.index("skip_reshape"):
        return q[1], k[1]
    if len(q) == len(k) == 4 and kwargs.get("skip_reshape"):
        return q[2], k[2]
    return None


@dataclass(eq=False)  # frozen, it would take twice as long to make
class AttentionCall:
    """One attention call.

    q, k, v: 4-D views of the caller's tensors.
    layout: "BNHD" or "BHND", of q, k, v and of the kernel's result. It is the layout that the caller wants its result
        in, whatever its inputs had, so that `give_back` never copies.
    mask: as the caller passed it.
    scale: None for head_dim ** -0.5.
    enable_gqa: whether k and v may have fewer heads than q.
    low_precision: False where the model refuses quantised attention.
    transformer_options: what ComfyUI tells of the evaluation.
    owned: whether the caller has given q, k and v away, so that v may be overwritten.
    batch, q_tokens, k_tokens: sizes. heads: of q, and of k and v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: str
    mask: Tensor | None = None
    scale: float | None = None
    enable_gqa: bool = False
    low_precision: bool = True
    transformer_options: dict[str, Any] = field(default_factory=dict)
    owned: bool = False
    batch: int = field(init=False)
    q_tokens: int = field(init=False)
    k_tokens: int = field(init=False)
    heads: tuple[int, int] = field(init=False)

    def __post_init__(self):
        q, k, tokens = self.q.shape, self.k.shape, 2 if self.layout == "BHND" else 1
        self.batch, self.q_tokens, self.k_tokens = q[0], q[tokens], k[tokens]
        self.heads = q[3 - tokens], k[3 - tokens]

    @classmethod
    def parse(cls, args: tuple, kwargs: dict[str, Any]) -> AttentionCall:
        """Read the arguments that follow `func`. Raises UnsupportedCall where they are not understood."""
        if len(args) > len(_POSITIONAL):
            raise UnsupportedCall(f"{len(args)} positional arguments")
        given = dict(zip(_POSITIONAL, args)) | kwargs
        # An argument of a newer ComfyUI may change what attention means, unless it is switched off.
        unknown = given.keys() - _KEYWORDS
        for name in sorted(unknown):
            if given[name] is not None and given[name] is not False:
                raise UnsupportedCall(f"unknown argument '{name}'")
        try:
            q, k, v, heads = given["q"], given["k"], given["v"], given["heads"]
        except KeyError as missing:
            raise UnsupportedCall(f"no argument {missing}") from None
        q, k, v, mask = _tensor("q", q), _tensor("k", k), _tensor("v", v), given.get("mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedCall(f"mask is a {type(mask).__name__}")
        if not isinstance(heads, int) or heads < 1:
            raise UnsupportedCall(f"heads is {heads!r}")
        if q.ndim not in (3, 4):
            raise UnsupportedCall(f"a {q.ndim}-D tensor")
        skip_reshape = bool(given.get("skip_reshape"))
        layout = "BHND" if given.get("skip_output_reshape") else "BNHD"
        head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        return cls(_split_heads(q, head_dim, skip_reshape, layout), _split_heads(k, head_dim, skip_reshape, layout),
                   _split_heads(v, head_dim, skip_reshape, layout), layout, mask, given.get("scale"),
                   bool(given.get("enable_gqa")), given.get("low_precision_attention") is not False,
                   given.get("transformer_options") or {})

    @functools.cached_property
    def key_mask(self) -> KeyMask | None:
        """The mask as `sparge_attention` takes it, None for one that depends on more than the key.

        Dtype and shape alone decide, because reading the values would wait for the device: a floating mask is a bias,
        whatever it holds.
        """
        mask = self.mask
        if mask is None:
            return {}
        if not 2 <= mask.ndim <= 4:
            return None
        # ComfyUI reads fewer than four dimensions as (Nq, Nk) and (B, Nq, Nk).
        batch, heads = {2: (1, 1), 3: (mask.shape[0], 1), 4: mask.shape[:2]}[mask.ndim]
        rows, columns = mask.shape[-2:]
        if heads != 1 or rows != 1 or columns != self.k_tokens or batch not in (1, self.batch):
            return None
        by_key = mask.reshape(batch, columns).expand(self.batch, columns)
        if mask.dtype == torch.bool:
            return {"key_padding_mask": ~by_key}  # ComfyUI's are True where a key takes part
        return {"key_bias": by_key} if mask.dtype in DTYPES else None

    def take_back(self, out: Tensor) -> Tensor | None:
        """The 4-D view, in `layout`, of what the caller got for a result; None where that is no attention of q."""
        if self.layout == "BNHD" and out.ndim == 3 and out.shape[-1] == self.heads[0] * self.q.shape[-1]:
            out = out.unflatten(-1, (self.heads[0], -1))
        return out if out.shape == self.q.shape and out.dtype == self.q.dtype and out.device == self.q.device else None

    def without_tensors(self) -> AttentionCall:
        """The same shapes and dtypes without the memory of q, k and v."""
        return replace(self, q=self.q.to("meta"), k=self.k.to("meta"), v=self.v.to("meta"))

    def give_back(self, out: Tensor) -> Tensor:
        """The kernel's result, in `layout`, as the caller wants it."""
        return out if self.layout == "BHND" else out.flatten(2)


def _tensor(name: str, x: Any) -> Tensor:
    """q, k or v, which may stand in a container."""
    if not isinstance(x, Tensor):
        x = x.peek() if hasattr(x, "peek") else x
        if not isinstance(x, Tensor):
            raise UnsupportedCall(f"{name} is a {type(x).__name__}")
    return x


def _split_heads(x: Tensor, head_dim: int, skip_reshape: bool, layout: str) -> Tensor:
    """A 4-D view of x in `layout`."""
    if x.ndim == 3 and not skip_reshape:
        if head_dim == 0 or x.shape[-1] % head_dim:
            raise UnsupportedCall(f"{x.shape[-1]} channels do not split into heads of {head_dim}")
        x = x.unflatten(-1, (x.shape[-1] // head_dim, head_dim))  # always a view
    elif x.ndim != 4:
        raise UnsupportedCall(f"a {x.ndim}-D tensor")
    return x if layout == ("BHND" if skip_reshape else "BNHD") else x.transpose(1, 2)

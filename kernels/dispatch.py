"""The implementation of a call: chosen once, given the tensors heads first, replaced where its kernels fail."""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from . import reference
from ._triton import replay
from ._triton.measured import give_up
from .call import CallSpec
from .capability import select_implementation
from .failures import FastPathError, raise_failed, remember
from .types import BlockMap, BlockShape, Residual, SpargeStats

_Result = TypeVar("_Result")


class Implementation(Protocol):
    """What a module has to offer. Tensors are q and out (B, H, Nq, D), k and v (B, Hkv, Nk, D)."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None,
                  call: CallSpec) -> SpargeStats | None:
        """Write the attention into `out`, and the log-sum-exp of its scores into `lse` if there is one, float32
        (B, H, Nq); return the statistics if the call asks for them. The fast kernels take v itself for `out`."""
        ...

    def residual(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: CallSpec) -> Residual:
        """What `dense`, attention like q, has beyond the attention."""
        ...

    def predict(self, q: Tensor, k: Tensor, call: CallSpec) -> BlockMap:
        """The block map alone."""
        ...

    def block_of(self, q: Tensor, pv_dtype: str) -> BlockShape:
        """The block shape of a call with q (…, D)."""
        ...


def attention(q: Tensor, k: Tensor, v: Tensor, call: CallSpec, layout: str, impl: str,
              overwrite_v: bool = False) -> tuple[Tensor, SpargeStats | None, Tensor | None]:
    """The output, in `layout`, of a checked call, and its statistics and log-sum-exp if it asks for them."""
    def run(chosen: Implementation) -> tuple[Tensor, SpargeStats | None, Tensor | None]:
        over_v = overwrite_v and chosen is not reference and not call.return_lse and _takes_result(v, q, k)
        of_q, of_k, of_v = (_heads_first(x, layout) for x in (q, k, v))
        out = v if over_v else torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(of_q.shape[:3], dtype=torch.float32, device=q.device) if call.return_lse else None
        stats = chosen.attention(of_q, of_k, of_v, of_v if over_v else _heads_first(out, layout), lse, call)
        return out, stats, lse

    # A given map is made of the blocks of the implementation that was chosen: no other one can take the call over.
    return _run(impl, q, run, falls_back=call.block_mask is None)


def residual(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: CallSpec, layout: str, impl: str) -> Residual:
    """What dense attention, in `layout`, has beyond a checked call."""
    q, k, v, dense = (_heads_first(x, layout) for x in (q, k, v, dense))
    return _run(impl, q, lambda chosen: chosen.residual(q, k, v, dense, call))


def predict(q: Tensor, k: Tensor, call: CallSpec, layout: str, impl: str) -> BlockMap:
    """The block map of a checked call."""
    q, k = _heads_first(q, layout), _heads_first(k, layout)
    return _run(impl, q, lambda chosen: chosen.predict(q, k, call))


def block_of(q: Tensor, pv_dtype: str, impl: str) -> BlockShape:
    """The block shape of the implementation that a call with q (…, D) gets."""
    return _run(impl, q, lambda chosen: chosen.block_of(q, pv_dtype))


def _run(impl: str, q: Tensor, run: Callable[[Implementation], _Result], falls_back: bool = True) -> _Result:
    """What the implementation that a call gets returns. With impl="auto", the reference takes over from kernels that
    fail, where it may. Raises RuntimeError where the implementation asked for by name can't take the call."""
    if impl != "reference":
        name, reason = select_implementation(q)
        if name == "triton":
            try:
                return _run_kernels(run, q.device)
            except FastPathError as error:
                remember(q, error)
                replay.forget()
                if impl == "triton" or not falls_back:
                    raise
        elif impl == "triton":
            raise RuntimeError(f"impl='triton' can't take this call: {reason}")
    return run(reference)


def _run_kernels(run: Callable[[Implementation], _Result], device: torch.device) -> _Result:
    """What the fast kernels return, with the table's launch configurations where measured ones fail."""
    try:
        return run(_pipeline())
    except FastPathError:
        if not give_up(device):
            raise
    return run(_pipeline())


def _pipeline() -> Implementation:
    """The module of the fast kernels; importing it imports Triton, which may be broken in any way."""
    try:
        from ._triton import pipeline
    except Exception as error:
        raise_failed("importing Triton", error)
    return pipeline


def _heads_first(x: Tensor, layout: str) -> Tensor:
    return x if layout == "BHND" else x.transpose(1, 2)


def _takes_result(v: Tensor, q: Tensor, k: Tensor) -> bool:
    """Whether the result can be written over v: it has the shape of q, no gaps, and memory that q and k don't use."""
    others = {x.untyped_storage().data_ptr() for x in (q, k)}
    return (v.shape == q.shape and any(x.is_contiguous() for x in (v, v.transpose(1, 2)))
            and v.untyped_storage().data_ptr() not in others)

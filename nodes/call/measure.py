"""One attention call measured against its dense result, for the search of thresholds."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...kernels import Residual, SpargeStats, attention_residual, select_implementation, sparge_attention
from ...kernels.capability import arch_of, pv_format
from ..tuned.candidates import TunedSetting
from ..tuned.search import Measured
from .arguments import AttentionCall, KeyMask
from .token_layout import TokenLayout, exact_tokens
from .tuned_setting import order_of

_TOKENS_AT_ONCE = 8192


class RefreshedCall(NamedTuple):
    """The attention call of a layer and its conditions in the evaluation that last refreshed their residual.

    dense: what dense attention gave for it, 4-D in the call's layout.
    earlier: the same of the refresh before, where the residual is extrapolated from that one.
    lead: how far, see `leads`.
    """

    call: AttentionCall
    dense: Tensor
    earlier: RefreshedCall | None = None
    lead: float = 0.0

    def residual(self, how: dict[str, Any]) -> Residual:
        """What sparse attention lacks of dense attention, extrapolated as in a run. how: as in `attention_residual`.

        A run extrapolates from a residual that may have been extrapolated itself. That takes all refreshes before, so
        the earlier one counts as it is here.
        """
        call, earlier = self.call, None if self.earlier is None else self.earlier.residual(how)
        return attention_residual(call.q, call.k, call.v, self.dense, earlier=earlier, lead=self.lead, **how,
                                  **call.key_mask or KeyMask())


class CallMeasure:
    """Runs one attention call with settings, and compares each result with the dense one.

    With a `refreshed` call, a setting is measured as a run with refreshes uses it: the call gets the residual that the
    same setting leaves of the refreshed one.

    A call is measured where it stands: beside its own tensors and those of the refreshed calls there are one output and
    a slice of it in float32 at a time, and the INT8 residuals.

    finite: whether the dense result is finite; otherwise there is nothing to compare with.
    """

    def __init__(self, call: AttentionCall, layout: TokenLayout | str, dense: Tensor,
                 check: Callable[[], None] = lambda: None, refreshed: RefreshedCall | None = None):
        """
        dense: as ComfyUI's attention returns it.
        check: raises where the user has stopped the run.
        refreshed: on the device of `call`.
        """
        self._call, self._layout, self._check, self._refreshed = call, layout, check, refreshed
        self._dense = dense if dense.ndim == 4 else dense.unflatten(-1, (call.q.shape[2], -1))
        self._axis = 2 if call.layout == "BHND" else 1
        self._norm = self._sums(None).clamp(min=1e-30)
        self.finite = bool(self._norm.isfinite().all())
        self._impl = select_implementation(call.q)[0]
        self._int8 = self._impl == "triton" and pv_format("auto", arch_of(call.q.device), call.q.shape[-1]) == "int8"

    def __call__(self, setting: TunedSetting) -> Measured | None:
        """None where the call can't run with this setting, for want of a grid or of hardware."""
        self._check()
        call = self._call
        order = order_of(setting.curves, self._layout, call.q.device)
        if isinstance(order, str) or (setting.pv_dtype == "int8" and not self._int8):
            return None
        how: dict[str, Any] = dict(params=setting.params, layout=call.layout, scale=call.scale, order=order,
                                   pv_dtype=setting.pv_dtype, skipped=setting.skipped, impl=self._impl,
                                   **exact_tokens(self._layout, order is not None))
        residual = None if self._refreshed is None else self._refreshed.residual(how)
        out, stats = cast(tuple[Tensor, SpargeStats], sparge_attention(
            call.q, call.k, call.v, residual=residual, return_stats=True, **how, **call.key_mask or KeyMask()))
        error = self._sums(out).div_(self._norm).amax(0)  # the worst of the batch
        error, kept = torch.stack([error, stats.kept.mean(0)]).cpu()
        return Measured(error, kept)

    def _sums(self, out: Tensor | None) -> Tensor:
        """Σ|out − dense| of every head, or Σ|dense| without `out`: float32 (B, H)."""
        total = torch.zeros((), device=self._dense.device)
        for start in range(0, self._dense.shape[self._axis], _TOKENS_AT_ONCE):
            length = min(_TOKENS_AT_ONCE, self._dense.shape[self._axis] - start)
            part = self._dense.narrow(self._axis, start, length).to(torch.float32, copy=True)
            if out is not None:
                part = part.sub_(out.narrow(self._axis, start, length))
            total = total + part.abs_().sum((self._axis, 3))
        return total

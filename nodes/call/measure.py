"""One attention call measured against its dense result, for the search of thresholds."""
from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ...kernels import SpargeStats, select_implementation, sparge_attention
from ...kernels.capability import arch_of, supports_fp8
from ..tuned.candidates import TunedSetting
from ..tuned.search import Measured
from .arguments import AttentionCall, KeyMask
from .token_layout import TokenLayout
from .tuned_setting import order_of

_TOKENS_AT_ONCE = 8192


class CallMeasure:
    """Runs one attention call with settings, and compares each result with the dense one.

    A call is measured where it stands: beside its own tensors there are one output and a slice of it in float32 at a
    time.

    finite: whether the dense result is finite; otherwise there is nothing to compare with.
    """

    def __init__(self, call: AttentionCall, layout: TokenLayout | str, dense: Tensor,
                 check: Callable[[], None] = lambda: None):
        """dense: as ComfyUI's attention returns it. check: raises where the user has stopped the run."""
        self._call, self._layout, self._check = call, layout, check
        self._dense = dense if dense.ndim == 4 else dense.unflatten(-1, (call.q.shape[2], -1))
        self._axis = 2 if call.layout == "BHND" else 1
        self._norm = self._sums(None).clamp(min=1e-30)
        self.finite = bool(self._norm.isfinite().all())
        self._impl = select_implementation(call.q)[0]
        arch = arch_of(call.q.device)
        self._fp8 = self._impl == "triton" and arch is not None and supports_fp8(arch)

    def __call__(self, setting: TunedSetting) -> Measured | None:
        """None where the call can't run with this setting, for want of a grid or of hardware."""
        self._check()
        call = self._call
        order = order_of(setting.curves, self._layout, call.q.device)
        if isinstance(order, str) or (setting.pv_dtype == "fp8" and not self._fp8):
            return None
        layout, sink_keys, dense_queries = self._layout, (), ()
        if not isinstance(layout, str):
            sink_keys, dense_queries = layout.sink_keys(order is not None), layout.exact
        out, stats = cast(tuple[Tensor, SpargeStats], sparge_attention(
            call.q, call.k, call.v, params=setting.params, layout=call.layout, scale=call.scale, order=order,
            sink_keys=sink_keys, dense_queries=dense_queries, pv_dtype=setting.pv_dtype, skipped=setting.skipped,
            impl=self._impl, return_stats=True, **call.key_mask or KeyMask()))
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

"""What was tuned for a call, in the form in which `sparge_attention` takes it."""
from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...hilbert import free_device_orders
from ...hilbert.permutation import OrderCache
from ...kernels import SpargeParams
from ..tuned.candidates import TunedSetting
from ..tuned.params import TunedParams
from .arguments import AttentionCall
from .token_layout import TokenLayout

_orders = OrderCache(capacity=1 << 24)  # 64 MiB of orders, for all heads or one for each
_on_device: WeakKeyDictionary[TunedSetting, dict[torch.device, SpargeParams]] = WeakKeyDictionary()


def setting_for(tuned: TunedParams, layer: str | None, call: AttentionCall) -> TunedSetting | None | str:
    """What was tuned for a call: a setting, None for dense attention, or why there is nothing for it.

    Raises ValueError where the layer has other heads than the call, unless the parameters are lenient.
    """
    found = tuned.layers.get(layer) if layer else None
    if found is None:
        return f"nothing was tuned for layer {layer}"
    tuned_on = found.search.heads, found.search.kv_heads, found.head_dim
    of_call = *call.heads, call.q.shape[-1]
    if tuned_on == of_call:
        return found.search.setting
    problem = "layer {} was tuned for {} heads of q, {} of k and head_dim {}".format(layer, *tuned_on)
    problem += ", this call has {}, {} and {}".format(*of_call)
    if not tuned.lenient:
        raise ValueError(f"params must fit the model: {problem}")
    return problem


def params_on(setting: TunedSetting, device: torch.device) -> SpargeParams:
    """The thresholds on `device`. They are copied once, because a copy waits for the device."""
    copies = _on_device.setdefault(setting, {})
    if device not in copies:
        copies[device] = setting.params.to(device)
    return copies[device]


def order_of(curves: tuple[str, ...], layout: TokenLayout | str, device: torch.device) -> Tensor | None | str:
    """The token order of a call, int32: (tokens,) for all heads, or (heads of k, tokens).

    None keeps the model's order. A text says why the layout is not known, where a curve needs it.
    """
    if set(curves) == {"row-major"} and (isinstance(layout, str) or not layout.others):
        return None
    if isinstance(layout, str):
        return layout
    if device.index is None:
        device = torch.empty(0, device=device).device  # "cuda" means the current one: give it its number

    def build() -> Tensor:
        orders = [layout.order(curve, device) for curve in curves]
        return orders[0] if len(set(curves)) == 1 else torch.stack(orders)

    return _orders.get((curves, layout, device), build)


def free_device_tensors() -> None:
    """Drop the copies of orders and thresholds that a run keeps on devices."""
    free_device_orders()
    _orders.keep_on_host()
    _on_device.clear()

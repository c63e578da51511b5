"""Thresholds of every layer of the demo's model for runs with and without refreshes, searched without ComfyUI."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.measure import CallMeasure, RefreshedCall
from comfyui_spargeattn.nodes.call.token_layout import TokenLayout
from comfyui_spargeattn.nodes.call.tuned_setting import order_of, params_on
from comfyui_spargeattn.nodes.tuned.candidates import TunedSetting
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch
from tests.demo.model import scaled_dot_product


@dataclass
class Searching:
    """Dense self-attention for `WanT2V.attention` that searches every layer at some steps, as Tune SpargeAttn does.

    refreshes: the steps that a run refreshes at, and how far it extrapolates the residuals of each; the others are
        measured with the residual of the last one.
    searched: the steps to search.
    layers: what was found.
    """

    layers: list[LayerSearch]
    layout: TokenLayout
    refreshes: dict[int, float]
    searched: frozenset[int]
    step: int = 0
    calls: int = 0
    refreshed: dict[int, RefreshedCall] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer, out = self.calls % len(self.layers), scaled_dot_product(q, k, v)
        self.calls += 1
        call = AttentionCall(q, k, v, "BHND")
        if self.step in self.refreshes:
            lead, earlier = self.refreshes[self.step], self.refreshed.get(layer)
            # The one before that is not kept, as in the node.
            earlier = earlier._replace(earlier=None) if lead and earlier else None
            self.refreshed[layer] = RefreshedCall(call, out, earlier, lead)
        if self.step in self.searched:
            measure = CallMeasure(call, self.layout, out, refreshed=self.refreshed[layer] if self.refreshes else None)
            self.layers[layer] = self.layers[layer].learn(measure)
        return out

    def enter_step(self, step: int) -> None:
        self.step = step


def searching(model, grid: tuple[int, int, int], l1: float, first: int, steps: int,
              refreshes: dict[int, float], samples: int = 3) -> Searching:
    """A search of `samples` steps, spread evenly over those from `first` on that are no refreshes."""
    heads = model.config.num_heads
    inside = [step for step in range(first, steps) if step not in refreshes]
    samples = min(samples, len(inside))
    searched = frozenset(inside[(2 * i + 1) * len(inside) // (2 * samples)] for i in range(samples))
    layers = [LayerSearch.start(heads, heads, Bounds(l1, l1)) for _ in model.blocks]
    return Searching(layers, TokenLayout(grid), refreshes, searched)


def arguments(setting: TunedSetting | None, layout: TokenLayout, q: Tensor) -> dict[str, Any] | None:
    """What the attention functions take beside the tensors, None where the layer was tuned to stay dense."""
    if setting is None:
        return None
    order = order_of(setting.curves, layout, q.device)
    return dict(params=params_on(setting, q.device), order=order, skipped=setting.skipped,
                pv_dtype="auto" if setting.pv_dtype == "int8" else setting.pv_dtype)

"""Tuned parameters of a model: what travels between the nodes as SPARGE_PARAMS."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .search import Bounds, LayerSearch

MOST_REFRESHES = 50  # of a run
_PLAIN = bool, int, float, str, type(None)


@dataclass(frozen=True)
class Architecture:
    """What must agree for parameters to fit a model: its class, and what ComfyUI detected in its weights."""

    family: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, patcher) -> Architecture:
        """Of a ModelPatcher."""
        model = patcher.model
        diffusion_model = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)  # torch.compile wraps
        config = getattr(getattr(model, "model_config", None), "unet_config", None) or {}
        return cls(type(diffusion_model).__name__, {key: plain(value) for key, value in sorted(config.items())
                                                    if is_plain(value)})

    def mismatch(self, model: Architecture) -> str | None:
        """What differs in `model`, None where nothing does."""
        if self.family != model.family:
            return f"they were tuned for {self.family:.80}, this model is {model.family}"
        for key in sorted(self.config.keys() | model.config.keys()):
            mine, its = self.config.get(key), model.config.get(key)
            if mine != its:
                return f"they were tuned for a {self.family} with {key} {mine!s:.80}, this model has {its!s:.80}"
        return None


@dataclass(frozen=True)
class TunedLayer:
    """What is known of one layer.

    search: what was found.
    head_dim: of its calls.
    tokens: descriptions of the sequences that it was tuned on.
    """

    search: LayerSearch
    head_dim: int
    tokens: tuple[str, ...] = ()

    def with_tokens(self, text: str) -> TunedLayer:
        return self if text in self.tokens else replace(self, tokens=(*self.tokens, text))


@dataclass(frozen=True)
class TunedParams:
    """SPARGE_PARAMS.

    layers: by the names that `LayerNames` gives.
    versions: of the software and hardware that tuned.
    continues: False for a file whose search had other candidates than this version's. It can be applied, and can't be
        tuned further.
    lenient: the user prefers the widgets to an error where the parameters don't fit the model.
    refreshes: of the runs that they were tuned for. With any, errors were measured on calls that get a residual, and a
        call without one must not use them.
    """

    architecture: Architecture
    bounds: Bounds
    layers: Mapping[str, TunedLayer] = field(default_factory=lambda: MappingProxyType({}))
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    continues: bool = True
    lenient: bool = False
    refreshes: int = 0

    def with_layer(self, name: str, layer: TunedLayer) -> TunedParams:
        return replace(self, layers=MappingProxyType({**self.layers, name: layer}))

    @property
    def sparsity(self) -> float:
        """Mean over all heads."""
        return _mean([layer.search.sparsity for layer in self.layers.values()])

    @property
    def error(self) -> tuple[float, float]:
        """(mean, largest) L1 of the heads of sparse layers on the calls they were tuned on."""
        return self._errors("error")

    @property
    def unseen_error(self) -> tuple[float, float] | None:
        """The same on calls they were not tuned on, None where there were none."""
        return self._errors("unseen") if any(x.search.unseen_calls for x in self.layers.values()) else None

    def _errors(self, name: str) -> tuple[float, float]:
        values = [getattr(layer.search, name) for layer in self.layers.values() if layer.search.setting is not None]
        return _mean(values), max((value.max().item() for value in values), default=0.0)

    def __str__(self) -> str:
        sparse = sum(layer.search.setting is not None for layer in self.layers.values())
        between = f" between {self.refreshes} refreshes" if self.refreshes else ""
        text = (f"{sparse} of {len(self.layers)} layers sparse, mean sparsity {self.sparsity:.1%}{between}, "
                "L1 of a head {:.4f} (largest {:.4f})".format(*self.error))
        if self.unseen_error is not None:
            text += ", with another seed {:.4f} (largest {:.4f})".format(*self.unseen_error)
        return text


def plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether a value is a number, text, None, or a list of them with at most `depth` levels."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(item, depth - 1) for item in value)
    return isinstance(value, _PLAIN)


def _mean(values: list[Tensor]) -> float:
    return torch.cat(values).mean().item() if values else 0.0

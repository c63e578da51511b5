"""The presets of Apply SpargeAttn: one table, from which the node, the editor, the examples and the texts take them."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a preset sets, by the names of the widgets."""

    selection: dict[str, Any]  # the choice by the same name, and all widgets that come with it
    skipped_blocks: str
    start_percent: float
    refreshes: int
    dense_steps: str

    @property
    def inputs(self) -> dict[str, Any]:
        """As the node gets them."""
        return asdict(self)

    @property
    def widgets(self) -> dict[str, Any]:
        """As a prompt or the editor has them, where names of widgets inside another hold a dot."""
        return {key: value for name, value in self.inputs.items()
                for key, value in (_flat(name, value) if isinstance(value, dict) else {name: value}).items()}


def _cdf(threshold: float) -> dict[str, Any]:
    return {"selection": "cdf", "cdf_threshold": threshold, "similarity_threshold": -1.0}  # -1 is off


def _topk(percent: float) -> dict[str, Any]:
    return {"selection": "topk", "keep_percent": percent, "similarity_threshold": -1.0}  # which it does not use


# On six clips of the demo's model in 20 steps, three seeds each, on an H200, these come to 49.9, 46.5 and 42.6 dB of
# dense attention's clips (43.3, 37.3 and 38.5 the worst), with all attention of a run 1.9, 2.4 and 2.9 times as fast as
# PyTorch's. Without refreshes, cdf 0.99 comes to 47.2 dB at 2.08 times, 0.98 to 43.2 at 2.25 and 0.95 to 37.2 at 2.57.
# So refreshes pay beyond 2.1 times, and below it a stricter threshold is better. A new node has a fixed share between
# refreshes, because its speed depends little on the model: of structured inputs, cdf 0.99 keeps nearly all blocks.
# Where strict does so too, balanced is 2.06 times as fast.
PRESETS = {
    "quality": Preset(_cdf(0.995), skipped_blocks="pooled", start_percent=0.2, refreshes=0, dense_steps="quantised"),
    "balanced": Preset(_topk(10.0), skipped_blocks="pooled", start_percent=0.2, refreshes=6, dense_steps="strict"),
    "fast": Preset(_topk(10.0), skipped_blocks="pooled", start_percent=0.2, refreshes=4, dense_steps="strict"),
}
CUSTOM = "custom"  # the widgets as they are; also what a prompt without a preset means
OF_A_NEW_NODE = "balanced"
# What a prompt leaves out, and what widgets show where no script has set a preset. Prompts that are older than
# `refreshes` mean none, and without them a threshold has to be stricter.
WITHOUT = Preset(_cdf(0.98), skipped_blocks="pooled", start_percent=0.2, refreshes=0, dense_steps="quantised")
DEFAULTS = WITHOUT.inputs


def chosen(preset: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs that hold, and those of a prompt that do not because the preset sets others.

    given: the prompt's values of the inputs that presets set, None where it leaves them out.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if preset == CUSTOM:
        return DEFAULTS | given, {}
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, {CUSTOM}; got {preset!r}")
    inputs = PRESETS[preset].inputs
    return inputs, {name: value for name, value in given.items() if value != inputs[name]}


def _flat(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The widgets of a dynamic combo, which stands among them with its choice."""
    return {name if key == name else f"{name}.{key}": value for key, value in values.items()}

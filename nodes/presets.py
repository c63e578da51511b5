"""The presets of Apply SpargeAttn: one table, from which the node, the editor, the examples and the texts take them."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a preset sets, by the names of the widgets. `selection` is cdf."""

    cdf_threshold: float
    similarity_threshold: float  # -1 is off
    skipped_blocks: str
    start_percent: float
    refreshes: int

    @property
    def inputs(self) -> dict[str, Any]:
        """As the node gets them."""
        return {"selection": {"selection": "cdf", "cdf_threshold": self.cdf_threshold,
                              "similarity_threshold": self.similarity_threshold},
                "skipped_blocks": self.skipped_blocks, "start_percent": self.start_percent,
                "refreshes": self.refreshes}

    @property
    def widgets(self) -> dict[str, Any]:
        """As a prompt or the editor has them, where names of widgets inside another hold a dot."""
        return {key: value for name, value in self.inputs.items()
                for key, value in (_flat(name, value) if isinstance(value, dict) else {name: value}).items()}


# On six clips of a trained model in 20 steps (tests/bench/README.md, "Refreshes"), these come to 47.9 dB of dense
# attention's clips at 1.8 times its speed, 47.0 at 2.0 times, and 43.4 at 2.4 times.
PRESETS = {
    "quality": Preset(cdf_threshold=0.9, similarity_threshold=-1.0, skipped_blocks="pooled", start_percent=0.2,
                      refreshes=6),
    "balanced": Preset(cdf_threshold=0.8, similarity_threshold=-1.0, skipped_blocks="pooled", start_percent=0.2,
                       refreshes=6),
    "fast": Preset(cdf_threshold=0.8, similarity_threshold=-1.0, skipped_blocks="pooled", start_percent=0.2,
                   refreshes=4),
}
CUSTOM = "custom"  # the widgets as they are; also what a prompt without a preset means
OF_A_NEW_NODE = "balanced"
# What a prompt leaves out, and what widgets show where no script has set a preset. Prompts that are older than
# `refreshes` mean none, and without them a threshold has to be stricter.
DEFAULTS = Preset(cdf_threshold=0.98, similarity_threshold=-1.0, skipped_blocks="pooled", start_percent=0.2,
                  refreshes=0).inputs


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

"""What the nodes share: their category, the socket of tuned parameters, inputs."""
from comfy_api.latest import io

from .presets import DEFAULTS

CATEGORY = "model/patch/SpargeAttn"
SPARGE_PARAMS = io.Custom("SPARGE_PARAMS")


def number(name: str, default: float, low: float, high: float, step: float, tooltip: str,
           advanced: bool | None = None) -> io.Float.Input:
    """A field to type in: a pixel of a slider is more than a step of most of these."""
    return io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip, advanced=advanced)


def start_percent(tooltip: str) -> io.Float.Input:
    return number("start_percent", DEFAULTS["start_percent"], 0.0, 1.0, 0.01, tooltip)


def end_percent(tooltip: str) -> io.Float.Input:
    return number("end_percent", 1.0, 0.0, 1.0, 0.01, tooltip)


def min_tokens(tooltip: str) -> io.Int.Input:
    return io.Int.Input("min_tokens", default=2048, min=0, max=1 << 20, step=256, advanced=True, tooltip=tooltip)


def similarity_threshold() -> io.Float.Input:
    return number(
        "similarity_threshold", DEFAULTS["selection"]["similarity_threshold"], -1.0, 1.0, 0.01,
        "Blocks of tokens that are less alike than this (mean cosine similarity) are always computed, because "
        "their average does not describe them. Higher is closer to dense attention; 0 and below switch the "
        "test off. Called θ in the paper, simthreshd1 in its code. "
        "It belongs to cdf; topk does not use it and has it for the sake of saved workflows.")

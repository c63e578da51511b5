"""A benchmark on the user's own card: dense and sparse attention, and the fastest launch configuration, which is kept.

`python -m comfyui_spargeattn.kernels.benchmark --help`; in ComfyUI the node Benchmark SpargeAttn.
"""
from .benchmark import SECONDS, Job, run
from .result import Result, Timed, Tried
from .shapes import SHAPES, Shape

__all__ = ["SECONDS", "SHAPES", "Job", "Result", "Shape", "Timed", "Tried", "run"]

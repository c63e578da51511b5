"""`python -m comfyui_spargeattn.kernels.benchmark`: times attention on this machine and prints a table."""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from .._triton.measured import load_configurations
from ..inputs import PV_DTYPES
from . import SECONDS, SHAPES, Job, Shape, run


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    shape = SHAPES[options.shape] if options.custom is None else Shape("custom", *options.custom)
    device = torch.device(options.device)
    free = None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        free = float(torch.cuda.mem_get_info(device)[0])
    if options.keep is not None:
        load_configurations(options.keep)
    job = Job(shape, device, scaled_dot_product_attention, "PyTorch's SDPA", free, options.pv_dtype,
              not options.no_tuning, options.keep, options.seconds)
    result = run(job, _Line())
    print(f"\n{result.text()}")


class _Line:
    """The progress, in one line of the terminal that is written anew."""

    def __init__(self):
        self._shown = ""

    def __call__(self, share: float, doing: str) -> None:
        text = f"{share:4.0%} {doing}"
        if text != self._shown:
            print(f"\r{text:<{len(self._shown)}}", end="", file=sys.stderr, flush=True)
            self._shown = text


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m comfyui_spargeattn.kernels.benchmark", description=__doc__,
                                     epilog="Shapes: " + "; ".join(SHAPES))
    parser.add_argument("--shape", choices=SHAPES, default=next(iter(SHAPES)), metavar="NAME",
                        help="of a model's attention, one of those below (default: %(default)s)")
    parser.add_argument("--custom", type=int, nargs=3, metavar=("HEADS", "HEAD_DIM", "TOKENS"),
                        help="another shape in place of a model's")
    parser.add_argument("--pv-dtype", choices=PV_DTYPES, default="auto", help="number format of P·V")
    parser.add_argument("--keep", type=Path, metavar="FILE",
                        help="keeps the fastest launch configuration; kernels.load_configurations(FILE) takes it")
    parser.add_argument("--no-tuning", action="store_true", help="tries no launch configurations")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time to spend (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Which Triton is installed, found without importing it, and what to install where it does not serve."""
from __future__ import annotations

import functools
import importlib.util
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

OLDEST: tuple[int, int] = (3, 2)
# The packages that bring the module triton.
_NAMES = ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton", "pytorch-triton-xpu",
          "triton-xpu")
# The Triton that each torch was made with. A newer torch goes with a newer Triton.
_OF_TORCH = {(2, 6): (3, 2), (2, 7): (3, 3), (2, 8): (3, 4), (2, 9): (3, 5), (2, 10): (3, 6), (2, 11): (3, 6)}


@functools.lru_cache
def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the Triton that is installed, None where no package tells; does not import it."""
    for name in _NAMES:
        with suppress(PackageNotFoundError, ValueError):
            major, minor = version(name).split(".")[:2]
            return int(major), int(minor)
    return None


def install_command() -> str:
    """What installs the Triton that fits this torch, for a user to type."""
    name = "triton-windows" if sys.platform == "win32" else "triton"
    major, minor = torch.__version__.split(".")[:2]
    fitting = _OF_TORCH.get((int(major), int(minor)))
    return f"pip install {name}" if fitting is None else "pip install {}~={}.{}.0".format(name, *fitting)

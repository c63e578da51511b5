"""What a result was measured on."""
from __future__ import annotations

import ctypes
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .._triton.measured import triton_name
from ..capability import arch_of, card_name
from ..triton_package import has_triton

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def machine(device: torch.device) -> dict[str, str]:
    """Card, driver, versions and system, in the order in which they are printed."""
    arch = arch_of(device)
    found = {"card": f"{card_name(device)} ({arch})" if arch else platform.processor() or platform.machine(),
             "driver": _nvidia_driver() if device.type == "cuda" and not torch.version.hip else None,
             "torch": torch.__version__,
             "Triton": triton_name() if has_triton() else "none",
             "SpargeAttn": _own_version(),
             "Python": platform.python_version(),
             "system": platform.platform(terse=True)}
    return {name: value for name, value in found.items() if value}


def _nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, from the library that it brings."""
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    with suppress(OSError, AttributeError):
        library, text = ctypes.CDLL(name), ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0:
            try:
                if library.nvmlSystemGetDriverVersion(text, len(text)) == 0:
                    return text.value.decode(errors="replace")
            finally:
                library.nvmlShutdown()
    return None


def _own_version() -> str | None:
    """From the repository's root, which is the package: ComfyUI installs no metadata."""
    with suppress(OSError, UnicodeDecodeError):
        found = re.search(r'^version = "(.+)"', _PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    from importlib.metadata import PackageNotFoundError, version
    with suppress(PackageNotFoundError):
        return version("spargeattn-nodes")
    return None

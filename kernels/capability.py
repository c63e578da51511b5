"""What the fast kernels can take: facts in, None or the reason why not out."""
from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_SM = 80
# CDNA3 (gfx94x, gfx95x) and RDNA3 and newer (gfx11xx, gfx12xx).
_AMD_FAMILIES = ("gfx94", "gfx95", "gfx11", "gfx12")
_log = logging.getLogger(__name__)


class FastPathError(RuntimeError):
    """The fast kernels can't be imported, compiled or launched; the text is cause and remedy."""


@dataclass(frozen=True)
class Facts:
    """What a decision needs to know of a call.

    arch: "sm90" and the like for NVIDIA, "gfx942" for AMD, "xpu" for Intel, "interpreter" under TRITON_INTERPRET=1,
    None elsewhere.
    """

    device: str
    arch: str | None
    dtype: torch.dtype
    head_dim: int
    has_triton: bool


def triton_declines(facts: Facts) -> str | None:
    """Why the Triton kernels can't take a call, or None where they can."""
    if facts.arch is None:
        return f"no kernels for device type {facts.device}"
    if facts.arch.startswith("sm") and int(facts.arch[2:]) < _MIN_SM:
        return f"compute capability {facts.arch} < sm{_MIN_SM}"
    if facts.arch.startswith("gfx") and not facts.arch.startswith(_AMD_FAMILIES):
        return f"AMD architecture {facts.arch} is older than CDNA3 and RDNA3"
    if not facts.has_triton:
        return f"Triton is not installed (pip install {_triton_package()})"
    if facts.dtype not in DTYPES:
        return f"dtype {facts.dtype} is none of float16, bfloat16, float32"
    if facts.arch == "interpreter" and facts.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if facts.head_dim > MAX_HEAD_DIM:
        return f"head_dim {facts.head_dim} > {MAX_HEAD_DIM}"
    return None


def supports_fp8(arch: str) -> bool:
    """Whether the architecture multiplies float8_e4m3fn: NVIDIA Ada (sm89) and newer."""
    return arch.startswith("sm") and int(arch[2:]) >= 89


def select_implementation(q: Tensor) -> tuple[str, str | None]:
    """The implementation that "auto" takes for q (..., D): ("triton", None), or ("reference", the reason why)."""
    reason = triton_declines(Facts(q.device.type, arch_of(q.device), q.dtype, q.shape[-1], has_triton()))
    if reason is None:
        return "triton", None
    if "not installed" in reason:
        _hint_install(reason)
    return "reference", reason


@functools.lru_cache
def arch_of(device: torch.device) -> str | None:
    """Architecture name of a device, as in `Facts.arch`."""
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "sm{}{}".format(*torch.cuda.get_device_capability(device))
    if device.type == "xpu":
        return "xpu"
    return "interpreter" if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" else None


@functools.lru_cache
def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def _triton_package() -> str:
    return "triton-windows" if sys.platform == "win32" else "triton"


@functools.lru_cache
def _hint_install(reason: str) -> None:
    _log.warning("SpargeAttn: the fast kernels are off: %s", reason)

"""What the fast kernels can take: all rules about architectures, dtypes, sizes and versions of Triton."""
from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .failures import remembered
from .triton_package import OLDEST, has_triton, install_command, triton_version

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_SM = 80
_BLACKWELL = (3, 3)  # the first Triton for sm100 and sm120
_PACKS_INT8 = (3, 4)  # the first Triton that makes P an INT8 operand without shared memory
# CDNA3 (gfx94x, gfx95x) and RDNA3 and newer (gfx11xx, gfx12xx).
_AMD_FAMILIES = ("gfx94", "gfx95", "gfx11", "gfx12")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a decision needs to know about a call.

    arch: "sm90" and the like for NVIDIA, "gfx942" for AMD, "xpu" for Intel, "interpreter" under TRITON_INTERPRET=1,
    None elsewhere.
    """

    device: str
    arch: str | None
    dtype: torch.dtype
    head_dim: int
    has_triton: bool
    triton: tuple[int, int] | None = None  # version, None where it is not known


def triton_declines(facts: Facts) -> str | None:
    """Why the Triton kernels can't take a call, or None where they can."""
    if facts.arch is None:
        return f"no kernels for device type {facts.device}"
    if facts.arch.startswith("sm") and int(facts.arch[2:]) < _MIN_SM:
        return f"compute capability {facts.arch} < sm{_MIN_SM}"
    if facts.arch.startswith("gfx") and not facts.arch.startswith(_AMD_FAMILIES):
        return f"AMD architecture {facts.arch} is older than CDNA3 and RDNA3"
    if not facts.has_triton:
        return f"Triton is not installed ({install_command()})"
    if facts.triton is not None and facts.triton < OLDEST:
        return "Triton {}.{} is older than {}.{} ({})".format(*facts.triton, *OLDEST, install_command())
    if facts.triton is not None and facts.triton < _BLACKWELL and facts.arch.startswith("sm1"):
        # Its compiler ends the whole process there.
        return "Triton {}.{} does not compile for {} ({})".format(*facts.triton, facts.arch, install_command())
    if facts.dtype not in DTYPES:
        return f"dtype {facts.dtype} is none of float16, bfloat16, float32"
    if facts.arch == "interpreter" and facts.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if facts.head_dim > MAX_HEAD_DIM:
        return f"head_dim {facts.head_dim} > {MAX_HEAD_DIM}"
    return None


def pv_format(pv_dtype: str, arch: str | None, head_dim: int) -> str:
    """The format that P·V is multiplied in on an architecture, "int8" or "fp16", for a choice out of `PV_DTYPES`.

    "auto" is int8 where it pays:
    - on NVIDIA's GPUs;
    - up to a head_dim of 128, beyond which registers run short (an H200 takes 4.8 ms where fp16 takes 3.1);
    - from Triton 3.4 on, before which P goes through shared memory, by 1.5 to 4 times the instructions of a block pair;
    - on an A100 beyond a head_dim of 64, up to which fp16 takes no more clocks, by the count of instructions.

    "fp8" is what releases up to 0.1 had in the place of INT8, which has half the error and takes no longer.
    """
    if pv_dtype == "auto":
        pays = (arch is not None and arch.startswith("sm") and (64 if arch == "sm80" else 0) < head_dim <= 128
                and (triton_version() or _PACKS_INT8) >= _PACKS_INT8)
        return "int8" if pays else "fp16"
    return "int8" if pv_dtype == "fp8" else pv_dtype


@functools.lru_cache
def _reason(*facts) -> str | None:
    """`triton_declines` of Facts, remembered because every call asks."""
    return triton_declines(Facts(*facts))


def select_implementation(q: Tensor) -> tuple[str, str | None]:
    """The implementation that "auto" takes for q (..., D): ("triton", None), or ("reference", the reason why)."""
    device = q.device
    reason = _reason(device.type, arch_of(device), q.dtype, q.shape[-1], has_triton(), triton_version())
    reason = reason or remembered(q)
    if reason is None:
        return "triton", None
    if reason.startswith("Triton "):
        _hint_install(reason)
    return "reference", reason


@functools.lru_cache
def arch_of(device: torch.device) -> str | None:
    """Architecture name of a device, as in `Facts.arch`."""
    if device.type == "cuda":
        if override := os.environ.get("TRITON_OVERRIDE_ARCH"):  # Triton generates the code of that one, to test it here
            return override
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "sm{}{}".format(*torch.cuda.get_device_capability(device))
    if device.type == "xpu":
        return "xpu"
    return "interpreter" if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" else None


def card_name(device: torch.device) -> str:
    """The GPU's name, or the type of the device where it has none."""
    return getattr(torch, device.type).get_device_name(device) if device.type in ("cuda", "xpu") else device.type


@functools.lru_cache
def _hint_install(reason: str) -> None:
    _log.warning("SpargeAttn: the fast kernels are off: %s", reason)

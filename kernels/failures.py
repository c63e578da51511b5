"""Fast kernels that fail: what the user reads, and which calls the kernels are not tried on again."""
from __future__ import annotations

import logging
import sys
from typing import NoReturn

import torch
from torch import Tensor

from .triton_package import install_command, triton_version

_log = logging.getLogger("comfyui_spargeattn")
# What the driver says after a kernel broke something: no later result on that device can be trusted.
_OF_THE_DEVICE = ("illegal memory access", "misaligned address", "illegal instruction", "invalid program counter",
                  "device-side assert", "unspecified launch failure", "hardware stack error", "launch timed out",
                  "uncorrectable ecc")
_failed: dict[tuple, str] = {}


class FastPathError(RuntimeError):
    """The fast kernels can't be imported, compiled or launched; the text is the cause and what to do."""


def raise_failed(what: str, error: Exception) -> NoReturn:
    """Raise FastPathError for `what`, which ended in `error` before it ever ran. Out of memory and errors of the device
    itself are raised as what they are. Call it in the handler of `error`."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (torch.OutOfMemoryError, FastPathError)) or is_of_the_device(error):
        raise error
    if "out of memory" in text.lower():  # the driver's, as Triton reports it
        raise torch.OutOfMemoryError(text) from error
    last_line = text.strip().splitlines()[-1].strip()
    raise FastPathError(f"{what} failed ({last_line[:200]}); {_remedy(text)}") from error


def is_of_the_device(error: Exception) -> bool:
    """Whether a kernel broke something, so that no later result on its device can be trusted."""
    return any(sign in str(error).lower() for sign in _OF_THE_DEVICE)


def remember(q: Tensor, error: FastPathError) -> None:
    """Don't try the fast kernels again on tensors like q (…, D), and tell the user once for each cause."""
    text = str(error)
    if text not in _failed.values():
        _log.warning("SpargeAttn: the fast kernels are off for calls like this one: %s", text)
        _log.debug("the cause:", exc_info=error)
    _failed[_kind(q)] = text


def remembered(q: Tensor) -> str | None:
    """Why the fast kernels are not tried on tensors like q (…, D), None where they are."""
    return _failed.get(_kind(q)) if _failed else None


def forget() -> None:
    """Try kernels that failed again."""
    _failed.clear()


def _kind(q: Tensor) -> tuple:
    return q.device, q.dtype, q.shape[-1]


def _remedy(text: str) -> str:
    found = text.lower()
    installed = triton_version()
    triton = "Triton" if installed is None else "Triton {}.{}".format(*installed)
    if "c compiler" in found or "cl.exe" in found or "gcc" in found:
        if sys.platform == "win32":
            return f"no C compiler was found: {install_command()}, which brings one"
        return "no C compiler was found: install one (Debian, Ubuntu: apt install build-essential) or name it in CC"
    if "python.h" in found:
        return "Python's headers are missing: install them (Debian, Ubuntu: apt install python3-dev)"
    if "importerror" in found or "modulenotfound" in found or "dll load" in found or "oserror" in found:
        return f"{triton} does not fit torch {torch.__version__}: {install_command()}"
    if "out of resource" in found or "outofresources" in found:
        return "this GPU has too little shared memory or too few registers for it; please report it with this text"
    if "ptxas" in found or "no kernel image" in found or "unsupported toolchain" in found or "[cuda]" in found:
        return f"the GPU's driver refused it: update the driver, or take the Triton that fits: {install_command()}"
    return f"{triton} does not serve torch {torch.__version__} on this GPU: {install_command()}, or report this text"

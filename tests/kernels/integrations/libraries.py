"""What the tests of all libraries run on, and attention over several devices by those that are installed."""
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPL = "triton" if DEVICE == "cuda" else "reference"  # the interpreter would take minutes
BOUND = 0.05 if DEVICE == "cuda" else 1e-5  # of the relative L1 with every block: INT8 there
two_devices = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")

_A_GPU = SimpleNamespace(name="a GPU", gcnArchName="")


def long_context_attention(library: str) -> type:
    """yunchang's LongContextAttention or xfuser's, which is xDiT's. Raises ImportError.

    xfuser 0.4.5 fits yunchang 0.6.4; 0.5 to 0.7 ask it for `update_npu_out`, which it lacks. xDiT has its attention on
    GPUs alone, so that a CPU passes for one while it is imported.
    """
    if library == "yunchang":
        from yunchang import LongContextAttention
        return LongContextAttention
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
            for name, value in {"is_available": True, "current_device": 0, "device_count": 1,
                                "get_device_name": "a GPU", "get_device_properties": _A_GPU,
                                "get_device_capability": (9, 0)}.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *args, value=value: value))
        try:
            import xfuser.core.long_ctx_attention.ring  # noqa: F401 - what the attention imports when it is made
            from xfuser.core.long_ctx_attention import xFuserLongContextAttention
        except Exception as error:  # whatever keeps it from being imported, such as another library's version
            raise ImportError(f"{type(error).__name__}: {error}") from error
    return xFuserLongContextAttention


def needs(library: str) -> None:
    """Skip the test where the library can't be imported."""
    try:
        long_context_attention(library)
    except ImportError as error:
        pytest.skip(f"{library} can't be imported: {error}")

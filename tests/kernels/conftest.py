"""The kernel tests run on a GPU where there is one, and in Triton's interpreter elsewhere."""
import importlib.util
import os
import sys

import pytest
import torch

from comfyui_spargeattn.kernels import capability
from comfyui_spargeattn.tests.kernels.harness import ON_GPU

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

if not ON_GPU and not collect_ignore_glob:
    # Triton decides for its interpreter where it is imported and where a kernel is defined. The variable is set for
    # that long only: the rest of the session takes the CPU for a machine without kernels.
    assert "triton" not in sys.modules, "triton was imported before it could be told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("comfyui_spargeattn.kernels._triton.pipeline")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Make the CPU a device that the Triton kernels take."""
    if ON_GPU:
        yield
        return
    from comfyui_spargeattn.kernels._triton import prepare
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(prepare, "SPLITS", 2)  # programs run one after another here
    capability.arch_of.cache_clear()
    yield
    capability.arch_of.cache_clear()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what is allocated without a value with NaN, or with a number no kernel means: reading it shows."""
    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.dtype == torch.float8_e4m3fn:
                x.view(torch.uint8).fill_(0x7F)  # NaN
            elif x.is_floating_point():
                x.fill_(torch.nan)
            elif x.dtype != torch.bool:
                x.fill_(-99)
            return x
        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def small_blocks(monkeypatch):
    """In the interpreter, blocks small enough for a few hundred tokens to make a map of interest."""
    if ON_GPU:
        return
    from comfyui_spargeattn.kernels import BlockShape
    from comfyui_spargeattn.kernels._triton import pipeline
    from comfyui_spargeattn.kernels._triton.config import AttendConfig
    monkeypatch.setattr(pipeline, "attend_config", lambda *key: AttendConfig(BlockShape(64, 32), 4, 2))

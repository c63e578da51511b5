"""The kernel tests run on a GPU where there is one, and in Triton's interpreter elsewhere."""
import importlib.util
import os
import sys

import pytest
import torch

from comfyui_spargeattn.kernels import capability, failures
from comfyui_spargeattn.kernels._triton import replay
from comfyui_spargeattn.tests.kernels._triton.harness import ON_GPU, faster_interpreter, poisoned_memory

_EMPTY = torch.empty
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
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sample, "SPLITS", 2)  # programs run one after another here
    capability.arch_of.cache_clear()
    with faster_interpreter():
        yield
    capability.arch_of.cache_clear()


@pytest.fixture(autouse=True)
def poison():
    assert torch.empty is _EMPTY, "an earlier test left torch.empty patched"
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def the_long_way():
    """Many of these tests replace a part of what a call goes through, which a repeated one would pass by."""
    with replay.off():
        yield


@pytest.fixture(autouse=True)
def failures_of_their_own():
    """A kernel that fails in one test is tried again in the next."""
    yield
    failures.forget()


@pytest.fixture
def small_blocks(monkeypatch):
    """In the interpreter, blocks small enough for a few hundred tokens to make a map of interest."""
    if ON_GPU:
        return
    from comfyui_spargeattn.kernels import BlockShape
    from comfyui_spargeattn.kernels._triton import pipeline
    from comfyui_spargeattn.kernels._triton.config import AttendConfig
    monkeypatch.setattr(pipeline, "attend_config", lambda *key: AttendConfig(BlockShape(64, 32), 4, 2))

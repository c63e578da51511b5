"""The first launch of a kernel that fails, and formats that the hardware lacks."""
import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError, capability, sparge_attention
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE


class Kernel:
    """A jitted function whose compilation ends in `error`."""

    def __init__(self, error):
        self.error, self.__name__, self.arg_names = error, "_broken_kernel", []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            raise self.error
        return run


def launch(error):
    from comfyui_spargeattn.kernels._triton.launch import launch
    launch(Kernel(error), (1,), torch.device(DEVICE), inputs={}, outputs={}, sizes={}, constants={}, options={})


@pytest.mark.parametrize("error", (RuntimeError("PassManager::run failed"), TypeError("rank mismatch"),
                                   FileNotFoundError("ptxas")), ids=str)
def test_a_first_launch_that_fails(error):
    with pytest.raises(FastPathError, match="kernel _broken_kernel failed") as raised:
        launch(error)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("no room"), KeyboardInterrupt(),
                                   RuntimeError("CUDA error: an illegal memory access was encountered")), ids=str)
def test_what_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as raised:
        launch(error)
    assert raised.value is error


@pytest.mark.parametrize("arch", ("sm80", "sm86", "gfx1100"))
def test_float8_where_there_is_none(arch, monkeypatch):
    from comfyui_spargeattn.kernels._triton import pipeline
    monkeypatch.setattr(pipeline, "arch_of", lambda device: arch)
    q, k, v = drifting_qkv(1, 1, 40, 16, dtype=torch.float16, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"pv_dtype='fp8' needs .*got {arch}"):
        sparge_attention(q, k, v, pv_dtype="fp8", impl="triton")


@pytest.mark.parametrize("version, expected", [((3, 2), {"sm90"}), ((3, 4), {"sm90"}),
                                               ((3, 5), {"sm89", "sm90", "sm120"}),
                                               ((3, 9), {"sm89", "sm90", "sm120"})])
def test_float8_by_version(version, expected, monkeypatch):
    monkeypatch.setattr(capability, "triton_version", lambda: version)
    assert {arch for arch in ("sm80", "sm86", "sm89", "sm90", "sm120") if capability.supports_fp8(arch)} == expected

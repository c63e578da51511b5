"""The first launch of a kernel that fails, and formats that the hardware lacks."""
import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError
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

"""A few of the random calls; `python -m comfyui_spargeattn.tests.fuzz` runs thousands."""
import pytest

from comfyui_spargeattn.tests.fuzz.check import TRITON, check
from comfyui_spargeattn.tests.kernels._triton.harness import ON_GPU


@pytest.mark.parametrize("seed", range(60 if ON_GPU else 10))
def test_random_call(seed):
    check(seed, TRITON)

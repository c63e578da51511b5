"""A few of the random calls; `python -m comfyui_spargeattn.tests.fuzz --device cpu` runs thousands."""
import pytest

from comfyui_spargeattn.tests.fuzz.check import EAGER, check


@pytest.mark.parametrize("seed", range(40))
def test_random_call(seed):
    check(seed, EAGER)

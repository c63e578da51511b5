"""A short soak through a real server, and the criterion by which a long one is judged."""
import os
import random
import subprocess

import pytest

from comfyui_spargeattn.tests.nodes.host.comfy_server import REPOSITORY, host_python
from comfyui_spargeattn.tests.soak.growth import slope

TOLERANCE = 0.006  # two standard deviations of the slope of `noise`


def noise(count=1000):
    draw = random.Random(0)
    return [draw.gauss(0, 20) + 300 * (draw.random() < 0.02) for _ in range(count)]


def test_noise_is_no_growth():
    assert abs(slope(noise())) < TOLERANCE


def test_a_single_step_hardly_counts():
    assert slope([value + 50 * (i > 900) for i, value in enumerate(noise())]) < TOLERANCE


@pytest.mark.parametrize("leak", (0.02, 0.5))
def test_a_leak_is_measured(leak):
    assert slope([value + leak * i for i, value in enumerate(noise())]) == pytest.approx(leak, abs=TOLERANCE)


@pytest.mark.comfy
@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI folder")
def test_short_soak():
    run = subprocess.run([host_python(), "-m", "tests.soak", "--prompts", "30", "--recipes", "6", "--seed", "5",
                          "--minutes", "5"], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert "sparse attention calls" in run.stdout

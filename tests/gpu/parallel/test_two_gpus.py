"""The benchmark of two GPUs at its own bounds, with a short model, and what it measures, on a CPU."""
import json
import os
import subprocess
import sys

import pytest
import torch

MODEL = {"dense", "every block", "topk 0.5", "topk 0.25"}


def measured(tmp_path, *options):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("yunchang", reason="yunchang is not installed")
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", f"{__package__}", "--out", str(out), *options]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    return json.loads(out.read_text())["found"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does(tmp_path):
    found = measured(tmp_path, "--layers", "6")
    balanced, plain = (found["call"]["cdf 0.8"][f"yunchang ulysses{how}"] for how in (" balanced", ""))
    assert balanced["kept by the busier GPU"] < plain["kept by the busier GPU"]


@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    found = measured(tmp_path, "--device", "cpu", "--tiny")
    assert set(found["model"]) == MODEL and set(found["call"]) == MODEL | {"cdf 0.8"}
    assert {"one GPU", "ulysses"} <= set(found["model"]["topk 0.5"])
    assert found["model"]["topk 0.5"]["ulysses"]["L1 to one GPU"] < 1e-5

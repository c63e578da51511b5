"""ComfyUI's split of conditions over two GPUs, dense and with Apply SpargeAttn."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_devices.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI folder"),
]


def test_two_gpus_sample_what_one_does(tmp_path):
    """As far as rounding goes: one GPU evaluates both conditions in one batch."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    python = next((str(path) for path in (comfyui / ".venv/bin/python",) if path.exists()), sys.executable)
    result = subprocess.run([python, str(SCRIPT), "--comfyui", str(comfyui), "--out", str(tmp_path / "facts.json")],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=580, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["layers_tuned"] == 6
    for name, run in facts["runs"].items():
        assert run["psnr_db"] > 30, (name, run)
        if name != "dense":  # the batch of both is one call, and two on two GPUs
            assert run["two"]["sparse"] == 2 * run["one"]["sparse"] > 0, (name, run)

"""The demo model at 32760 tokens in a real ComfyUI on a GPU."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("demo_model.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.comfy,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI folder"),
]
STEPS = 20
# A run may read the noise schedule when it starts and its statistics when it ends.
SYNCHRONISATIONS_OF_A_RUN = 8


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What demo_model.py measured; in its own process, where ComfyUI's module names meet no others."""
    out = tmp_path_factory.mktemp("demo") / "facts.json"
    comfyui = Path(os.environ["COMFYUI_PATH"])
    python = next((str(path) for path in (comfyui / ".venv/bin/python",) if path.exists()), sys.executable)
    result = subprocess.run([python, str(SCRIPT), "--comfyui", str(comfyui), "--steps", str(STEPS), "--out", str(out)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540,
                            check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    return json.loads(out.read_text())


def test_every_self_attention_call_was_sparse(facts):
    """On a GPU a call is sparse only where a fast kernel takes it."""
    assert facts["tokens"] == 32760
    assert facts["stayed_dense"] == 0, facts["log"]
    assert any(f"{facts['self_attention_calls']} attention calls sparse" in line for line in facts["log"])


def test_clip_is_close_to_dense(facts):
    assert facts["finite"]
    assert facts["psnr_db"] > 40


def test_unpatched_model_is_unchanged(facts):
    assert facts["dense_before_and_after_equal"]


def test_no_host_synchronisation_is_added(facts):
    dense, sparse = facts["dense"], facts["sparse"]
    assert sparse["synchronisations_in_the_model"] <= dense["synchronisations_in_the_model"], sparse["lines"]
    assert sparse["synchronisations"] <= dense["synchronisations"] + SYNCHRONISATIONS_OF_A_RUN

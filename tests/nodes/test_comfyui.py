"""The node in a real ComfyUI: every test of host/, run by ComfyUI's interpreter and reported here under its name."""
import os

import pytest

from comfyui_spargeattn.tests.nodes.host_tests import collect

pytestmark = pytest.mark.comfy

if "COMFYUI_PATH" in os.environ:
    CASES = collect()
else:
    CASES = [pytest.param("", marks=pytest.mark.skip("set COMFYUI_PATH to a ComfyUI folder to run the node tests"))]


@pytest.mark.parametrize("case", CASES)
def test_in_comfyui(case, host_tests):
    code, output = host_tests.finish()
    outcome, text = host_tests.outcomes().get(case, ("failed", f"has no result; exit code {code}:\n{output[-4000:]}"))
    if outcome == "skipped":
        pytest.skip(text)
    assert outcome == "passed", text

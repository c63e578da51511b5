"""The node in a real ComfyUI: every test of host/, run by ComfyUI's interpreter and reported here under its name."""
import os

import pytest

import host_runner

if "COMFYUI_PATH" in os.environ:
    CASES = host_runner.collect()
else:
    CASES = [pytest.param("", marks=pytest.mark.skip("set COMFYUI_PATH to a ComfyUI folder to run the node tests"))]


@pytest.fixture(scope="module")
def outcomes(request):
    """Results of the selected host tests, all from one ComfyUI process."""
    selected = [item.callspec.params["case"] for item in request.session.items
                if item.path == request.path]
    return host_runner.run(selected)


@pytest.mark.parametrize("case", CASES)
def test_in_comfyui(case, outcomes):
    outcome, text = outcomes[case]
    if outcome == "skipped":
        pytest.skip(text)
    assert outcome == "passed", text

"""The node in a real ComfyUI: every test of host/, run by ComfyUI's interpreter and reported here under its name.

ComfyUI brings its own torch and a hundred packages more, which the environment of this test run need not have; and
its top-level modules, such as `nodes`, must not meet this project's in one process.
"""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from comfyui_spargeattn.tests.nodes.host.comfy_server import host_python

pytestmark = pytest.mark.comfy
HOST = Path(__file__).parent / "host"
TIMEOUT = 3600  # seconds for all host tests together


def host_pytest(*arguments, report=None):
    """Exit code and output of a pytest of ComfyUI's interpreter on host/.

    report: file for its results, one JSON line a test. Nothing that it started outlives it.
    """
    command = [host_python(), "-m", "pytest", "-c", str(HOST / "pytest.ini"), "--rootdir", str(HOST), "--confcutdir",
               str(HOST), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    if report:
        environment["SPARGEATTN_HOST_REPORT"] = str(report)
    process = subprocess.Popen(command, cwd=HOST, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _kill_session(process)
        return None, f"not finished after {TIMEOUT} seconds:\n{process.communicate()[0]}"
    except BaseException:
        _kill_session(process)
        raise


def _kill_session(process):
    """End `process` and, where the system has process groups, its children: ComfyUI's server is one."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def collect():
    """Ids of the host tests, e.g. `test_families.py::test_batch_of_two[wan]`."""
    code, output = host_pytest("--collect-only")
    ids = [line for line in output.splitlines() if "::" in line]
    if code != 0 or not ids:
        raise RuntimeError(f"{host_python()} could not collect the tests of {HOST}:\n{output}")
    return ids


if "COMFYUI_PATH" in os.environ:
    CASES = collect()
else:
    CASES = [pytest.param("", marks=pytest.mark.skip("set COMFYUI_PATH to a ComfyUI folder to run the node tests"))]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """{id: (outcome, text)} of the selected host tests, all run in one process."""
    selected = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]
    report = tmp_path_factory.mktemp("host") / "report.jsonl"
    _, output = host_pytest(*selected, report=report)
    found = {case: ("failed", f"has no result:\n{output[-4000:]}") for case in selected}
    lines = map(json.loads, report.read_text().splitlines() if report.exists() else ())
    # A test that passes and then fails in its teardown has two lines.
    for line in sorted(lines, key=lambda line: line["outcome"] != "passed"):
        found[line["id"]] = line["outcome"], line["text"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_in_comfyui(case, outcomes):
    outcome, text = outcomes[case]
    if outcome == "skipped":
        pytest.skip(text)
    assert outcome == "passed", text

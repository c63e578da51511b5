"""Runs the tests in host/ with ComfyUI's interpreter.

ComfyUI brings its own torch and a hundred packages more, which the environment of this test run need not have; and
its top-level `nodes` and `utils` modules must not meet another project's in one process.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HOST = Path(__file__).parent / "host"
TIMEOUT = 900  # seconds for all host tests together


def python():
    """ComfyUI's virtual environment where its folder has one, else this interpreter."""
    root = Path(os.environ["COMFYUI_PATH"])
    for candidate in (root / ".venv/bin/python", root / ".venv/Scripts/python.exe"):
        if candidate.exists():
            return str(candidate)
    return sys.executable


def _pytest(*arguments, report=None):
    command = [python(), "-m", "pytest", "-c", str(HOST / "pytest.ini"), "--rootdir", str(HOST), "--confcutdir",
               str(HOST), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        filter(None, (str(HOST), os.environ.get("PYTHONPATH"))))}
    environment.pop("PYTEST_ADDOPTS", None)
    if report:
        environment["SPARGEATTN_HOST_REPORT"] = report
    return subprocess.run(command, cwd=HOST, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=TIMEOUT)


def collect():
    """Ids of the host tests, e.g. `test_families.py::test_topk[wan]`. RuntimeError with pytest's output if it fails."""
    result = _pytest("--collect-only", "-q")
    if result.returncode:
        raise RuntimeError(f"{python()} could not collect the tests of {HOST}:\n{result.stdout}")
    return [line for line in result.stdout.splitlines() if "::" in line]


def run(ids):
    """Run the host tests `ids` in one process; returns {id: (outcome, text)}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        result = _pytest(*ids, report=str(report))
        lines = report.read_text().splitlines() if report.exists() else []
    outcomes = {case: ("failed", f"did not run:\n{result.stdout[-4000:]}") for case in ids}
    passed_first = sorted(map(json.loads, lines), key=lambda line: line["outcome"] != "passed")
    outcomes.update((line["id"], (line["outcome"], line["text"])) for line in passed_first)
    return outcomes

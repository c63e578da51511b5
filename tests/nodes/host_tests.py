"""A run of the tests in host/ by ComfyUI's own interpreter.

ComfyUI brings its own torch and a hundred packages more, which the environment of this test run need not have; and
its top-level modules, such as `nodes`, must not meet this project's in one process.
"""
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from comfyui_spargeattn.tests.nodes.host.comfy_server import host_python

HOST = Path(__file__).parent / "host"
TIMEOUT = 3600  # seconds for all host tests together


class HostTests:
    """A pytest on host/ that runs beside this process. Whoever starts it stops it, after which nothing of it is left.

    arguments: of pytest, such as the ids of tests.
    """

    def __init__(self, *arguments: str):
        self._folder = tempfile.TemporaryDirectory()
        self._report = Path(self._folder.name) / "report.jsonl"  # a line for each result, written by host/conftest.py
        self._output = Path(self._folder.name) / "output"
        command = [host_python(), "-m", "pytest", "-c", str(HOST / "pytest.ini"), "--rootdir", str(HOST),
                   "--confcutdir", str(HOST), *arguments]
        environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
        with self._output.open("w") as output:  # a pipe that nobody reads would fill up
            self._process = subprocess.Popen(
                command, cwd=HOST, env=environment | {"SPARGEATTN_HOST_REPORT": str(self._report)}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True)
        self._end = time.monotonic() + TIMEOUT

    def finish(self) -> tuple[int | None, str]:
        """Wait for the end. The exit code, None where it did not come in time, and what was printed."""
        try:
            return self._process.wait(max(0, self._end - time.monotonic())), self._output.read_text()
        except subprocess.TimeoutExpired:
            return None, f"not finished after {TIMEOUT} seconds:\n{self._output.read_text()}"

    def outcomes(self) -> dict[str, tuple[str, str]]:
        """{id: (outcome, text)} of the tests that have ended."""
        lines = map(json.loads, self._report.read_text().splitlines() if self._report.exists() else ())
        # A test that passes and then fails in its teardown has two lines.
        return {line["id"]: (line["outcome"], line["text"])
                for line in sorted(lines, key=lambda line: line["outcome"] != "passed")}

    def stop(self) -> None:
        """End the process and, where the system has process groups, its children: ComfyUI's server is one."""
        try:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        except ProcessLookupError:
            pass
        self._process.wait()
        self._folder.cleanup()


def collect() -> list[str]:
    """Ids of the host tests, e.g. `test_families.py::test_batch_of_two[wan]`."""
    run = HostTests("--collect-only")
    try:
        code, output = run.finish()
    finally:
        run.stop()
    ids = [line for line in output.splitlines() if "::" in line]
    if code != 0 or not ids:
        raise RuntimeError(f"{host_python()} could not collect the tests of {HOST}:\n{output}")
    return ids

"""No kernel touches memory outside its tensors, reads what nothing wrote, or races for shared memory."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comfyui_spargeattn.tests.gpu.device import needs_gpu

pytestmark = needs_gpu
SCRIPT = Path(__file__).with_name("sanitized_calls.py")
TOOL = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")


def run(*command, arguments=()):
    # Every tensor has an allocation of its own, so that the tool sees reads past its end or of unwritten memory.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run([*command, sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True,
                            timeout=600, check=False, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "every call finished" in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def compiled():
    """Run the calls once without the tool, so that Triton's cache holds the compiled kernels."""
    run()


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
@pytest.mark.parametrize("tool, summary", [("memcheck", "ERROR SUMMARY: 0 errors"),
                                           ("initcheck", "ERROR SUMMARY: 0 errors"),
                                           ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed")])
def test_finds_nothing(tool, summary, compiled):
    # The entries of a returned map beyond its counts are undefined, and are copied with the rest.
    maps = () if tool != "initcheck" else ("--without-maps",)
    assert summary in run(TOOL, "--tool", tool, "--error-exitcode", "9", arguments=maps)

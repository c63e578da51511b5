"""No kernel touches memory outside its tensors."""
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


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
def test_memcheck():
    # Every tensor an allocation of its own, so that reading past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run([TOOL, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(SCRIPT)],
                            capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "every call finished" in result.stdout and "ERROR SUMMARY: 0 errors" in result.stdout

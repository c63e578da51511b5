"""Importing the kernels needs torch alone and logs nothing. A missing Triton is reported once, when a call needs it."""
import os
import subprocess
import sys

# Hides triton from every finder, and collects what is logged.
PREPARE = """
import logging, sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

class Collect(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())

records = []
logging.getLogger().addHandler(Collect(logging.DEBUG))
logging.getLogger().setLevel(logging.DEBUG)
"""
HIDE_TRITON = "sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]\n"


def run(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, timeout=120,
                            check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == "", result.stdout + result.stderr


def test_import_leaves_triton_alone():
    run("""
import comfyui_spargeattn.kernels
assert "triton" not in sys.modules, "triton was imported"
assert not any(name.startswith("comfyui_spargeattn.nodes") for name in sys.modules)
assert not records, records
""")


def test_import_and_reference_without_triton():
    run(HIDE_TRITON + """
import torch
import comfyui_spargeattn
from comfyui_spargeattn.kernels import block_map, sparge_attention
try:
    import triton
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("triton is not hidden")
q = torch.randn(1, 2, 70, 8)
assert sparge_attention(q, q, q).shape == q.shape
assert block_map(q, q).mask().shape == (1, 2, 1, 2)
assert not records, records
""")


def test_missing_triton_is_reported_once():
    run(HIDE_TRITON + """
import torch
from comfyui_spargeattn.kernels import capability, select_implementation, sparge_attention
capability.arch_of = lambda device: "sm90"  # as on a GPU
q = torch.randn(1, 2, 70, 8)
for _ in range(3):
    name, reason = select_implementation(q)
    assert name == "reference" and "pip install triton" in reason, reason
    sparge_attention(q, q, q)
assert len(records) == 1 and "pip install triton" in records[0], records
try:
    sparge_attention(q, q, q, impl="triton")
except RuntimeError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("impl='triton' fell back silently")
assert len(records) == 1, records
""")

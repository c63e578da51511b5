"""What the scripts here share: ComfyUI started in this process with the pack, and the pack's log lines kept."""
import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS / "nodes/host")]  # tests/demo as a package; comfy_host and its neighbours


class KeptLines(logging.Handler):
    """Log lines of the pack, in order."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if "SpargeAttn" in record.getMessage():
            self.lines.append(record.getMessage())


def start(comfyui, **options):
    """Start ComfyUI from the folder `comfyui` with command-line `options`; returns (its `nodes` module, KeptLines)."""
    os.environ["COMFYUI_PATH"] = str(comfyui)
    import comfy_host

    base = Path(tempfile.mkdtemp(prefix="comfyui-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    comfy_host.prepare_base_directory(base)
    kept = KeptLines()
    logging.getLogger().addHandler(kept)
    nodes = comfy_host.start(base, **options)
    logging.getLogger().setLevel(logging.INFO)
    return nodes, kept

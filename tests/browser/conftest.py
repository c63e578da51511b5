"""What the browser tests share, and what they need."""
import importlib.util
import os
from pathlib import Path

import pytest


def missing():
    """What the browser tests need and this machine has not; empty where it has all."""
    if "COMFYUI_PATH" not in os.environ:
        return "set COMFYUI_PATH to a ComfyUI folder to run the browser tests"
    if not importlib.util.find_spec("playwright"):
        return "the browser tests need Playwright (pip install playwright)"
    from comfyui_spargeattn.tests.browser.editor import CHROMIUM

    return "" if CHROMIUM else "the browser tests need chromium"


class SkippedFile(pytest.Module):
    """A file that is not imported."""

    def collect(self):
        pytest.skip(missing(), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return SkippedFile.from_parent(parent, path=module_path) if missing() else None


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("SPARGEATTN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda editor, name: editor.page.screenshot(path=folder / f"{name}.png")

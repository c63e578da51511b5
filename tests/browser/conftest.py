"""What the browser tests share."""
import os
from pathlib import Path

import pytest


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("SPARGEATTN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda editor, name: editor.page.screenshot(path=folder / f"{name}.png")

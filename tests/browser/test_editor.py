"""The pack in ComfyUI's real editor, as a new user meets it: search, examples, tooltips and help, in two languages.

Screenshots of every stage are left in the folder that SPARGEATTN_SCREENSHOTS names.
"""
import json
import os
from pathlib import Path

import pytest

from comfyui_spargeattn.tests.nodes.host import comfy_server

if "COMFYUI_PATH" not in os.environ:
    pytest.skip("set COMFYUI_PATH to a ComfyUI folder to run the browser tests", allow_module_level=True)
pytest.importorskip("playwright", reason="the browser tests need Playwright (pip install playwright)")

from comfyui_spargeattn.tests.browser.editor import CHROMIUM, Editor, browser  # noqa: E402

if CHROMIUM is None:
    pytest.skip("the browser tests need chromium", allow_module_level=True)

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
WORKFLOWS = sorted(path.stem for path in (comfy_server.REPOSITORY / "workflows").glob("*.json"))
PROMPTS = comfy_server.REPOSITORY / "tests/nodes/host/prompts"
NODES = {"ApplySpargeAttn": "Apply SpargeAttn", "SpargeAttnReport": "SpargeAttn Report"}
LANGUAGES = "en", "zh", "zh-TW"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    comfy_server.prepare(base, models=comfy_server.needed_models())
    with comfy_server.running(base, "--cpu") as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def editor(server, chromium):
    return Editor(chromium, server.url)


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("SPARGEATTN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda editor, name: editor.page.screenshot(path=folder / f"{name}.png")


def translations(language):
    return json.loads((comfy_server.REPOSITORY / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))


def test_loads_without_an_error_of_this_pack(editor, server, screenshot):
    screenshot(editor, "start")
    assert not [error for error in editor.errors if "sparge" in error.lower()], editor.errors
    assert "IMPORT FAILED" not in server.log() and "Error while calling comfy_entrypoint" not in server.log()


@pytest.mark.parametrize("words", ("sparge", "sage", "sparse attention", "speed up", "accelerate", "加速", "稀疏注意力"))
def test_search_finds_the_node(editor, words, screenshot):
    editor.close_dialogs()
    editor.search(words)
    screenshot(editor, f"search_{words.replace(' ', '_')}")
    found = editor.page.get_by_role("option").all_inner_texts() or editor.page.locator("body").inner_text()
    assert "Apply SpargeAttn" in "\n".join([found] if isinstance(found, str) else found)
    editor.close_dialogs()

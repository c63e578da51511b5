"""The pack in ComfyUI's real editor, as a new user meets it: search, examples, tooltips and help, in two languages.

Every stage leaves screenshots in the folder that SPARGEATTN_SCREENSHOTS names.
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

pytestmark = pytest.mark.comfy
WORKFLOWS = sorted(path.stem for path in (comfy_server.REPOSITORY / "workflows").glob("*.json"))
PROMPTS = comfy_server.REPOSITORY / "tests/nodes/host/prompts"
NODES = "ApplySpargeAttn", "SpargeAttnReport", "SpargeAttnTune", "SpargeAttnSaveParams", "SpargeAttnLoadParams"
DEMO_NODES = "LoadSpargeAttnDemoModel", "EncodeSpargeAttnDemo", "DecodeSpargeAttnDemo"
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


@pytest.mark.parametrize("words", ("sparge", "sage", "sparse attention", "speed up", "accelerate", "加速",
                                   "稀疏注意力"))
def test_search_finds_every_node(editor, words, screenshot):
    wanted = [translations("en")[node]["display_name"] for node in NODES]
    found = editor.search(words, wanted)
    screenshot(editor, f"search_{words.replace(' ', '_')}")
    editor.close_dialogs()
    assert set(wanted) <= set(found)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_example_opens_from_the_template_browser(editor, name, screenshot):
    editor.run("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    editor.page.get_by_text("spargeattn-nodes").first.click()
    card = editor.page.get_by_text(name, exact=True).first
    card.wait_for()
    if name == WORKFLOWS[0]:
        editor.page.wait_for_timeout(3000)  # pictures are loaded lazily
        widths = editor.run("() => [...document.querySelectorAll('img')].filter(image => image.src.startsWith('blob:'))"
                            ".map(image => image.naturalWidth)")
        screenshot(editor, "templates")
        assert widths.count(960) >= 8, widths
    card.click()
    editor.page.wait_for_function("() => app.graph._nodes.some(node => node.type === 'ApplySpargeAttn')")
    editor.page.wait_for_timeout(500)
    text = editor.page.locator("body").inner_text()
    editor.fit()
    screenshot(editor, f"workflow_{name}")
    assert "Missing" not in text and "missing" not in text, text
    assert not editor.run("() => app.graph._nodes.filter(node => node.has_errors || !node.constructor.nodeData && "
                          "node.type !== 'MarkdownNote').map(node => node.type)")
    _, prompt = editor.export()
    assert prompt == json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
    editor.clear()


@pytest.fixture(scope="module", params=LANGUAGES)
def translated(server, chromium, request):
    editor = Editor(chromium, server.url)
    editor.setting("Comfy.Locale", request.param)
    editor.page.reload()
    editor.wait_until_ready()
    yield request.param, editor
    editor.setting("Comfy.Locale", "en")
    editor.context.close()


@pytest.mark.parametrize("node", NODES + DEMO_NODES)
def test_names_tooltips_and_help(translated, node, screenshot):
    language, editor = translated
    expected = translations(language)[node]
    shown = editor.place(node)
    assert shown["title"] == expected["display_name"]
    widgets = [(name, label) for name, label in shown["widgets"] if name != "control_after_generate"]  # the editor's
    names = {name.replace(".", "_"): label for name, label in widgets}
    assert names == {name: expected["inputs"][name]["name"] for name in names}
    for name, _ in widgets:
        tooltip = editor.tooltip(node, name)
        assert tooltip == expected["inputs"][name.replace(".", "_")]["tooltip"], name
    screenshot(editor, f"tooltip_{node}_{language}")
    editor.page.get_by_test_id("info-button").click()
    page = (comfy_server.REPOSITORY / f"nodes/web/docs/{node}/{language}.md").read_text(encoding="utf-8")
    heading = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")][-1]
    editor.page.get_by_role("heading", name=heading).first.wait_for()
    editor.page.wait_for_timeout(1000)
    screenshot(editor, f"help_{node}_{language}")
    broken = editor.run("() => [...document.querySelectorAll('img')].filter(image => /docs/.test(image.src) && "
                        "!image.naturalWidth).map(image => image.src)")
    pictures = editor.run("() => [...document.querySelectorAll('img')].filter(image => /docs/.test(image.src)).length")
    assert not broken and pictures == page.count("![")
    assert not [error for error in editor.errors if "sparge" in error.lower()]

"""The pack in ComfyUI's real editor, as a new user meets it: search, examples, tooltips and help, in two languages.

Every stage leaves screenshots in the folder that SPARGEATTN_SCREENSHOTS names.
"""
import json

import pytest

from comfyui_spargeattn.tests.browser.editor import PATIENCE, Editor, browser
from comfyui_spargeattn.tests.nodes.host import comfy_server

pytestmark = pytest.mark.comfy
WORKFLOWS = sorted(path.stem for path in (comfy_server.REPOSITORY / "workflows").glob("*.json"))
HOST = comfy_server.REPOSITORY / "tests/nodes/host"
PROMPTS = HOST / "prompts"
SAVED = sorted(path.relative_to(HOST / "saved") for path in (HOST / "saved").glob("*/workflows/*.json"))
NODES = ("ApplySpargeAttn", "SpargeAttnReport", "SpargeAttnTune", "SpargeAttnSaveParams", "SpargeAttnLoadParams",
         "SpargeAttnBenchmark")
DEMO_NODES = "LoadSpargeAttnDemoModel", "EncodeSpargeAttnDemo", "DecodeSpargeAttnDemo"
LANGUAGES = "en", "zh", "zh-TW"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    comfy_server.prepare(base, models=comfy_server.needed_models())
    (base / "custom_nodes/random_conditioning").symlink_to(HOST / "random_conditioning")
    (base / "models/diffusion_models/demo.safetensors").symlink_to(
        comfy_server.REPOSITORY / "nodes/demo/wan_shapes.safetensors")
    with comfy_server.running(base, "--cpu") as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def editor(server, chromium):
    return Editor(chromium, server.url)


def translations(language):
    return json.loads((comfy_server.REPOSITORY / f"locales/{language}/nodeDefs.json").read_text(encoding="utf-8"))


def test_loads_without_an_error_of_this_pack(editor, server, screenshot):
    screenshot(editor, "start")
    assert not [error for error in editor.errors if "sparge" in error.lower()], editor.errors
    assert "IMPORT FAILED" not in server.log() and "Error while calling comfy_entrypoint" not in server.log()


@pytest.mark.parametrize("words", ("sparg", "sparge", "spargeattn", "attention sparge", "sage attention",
                                   "sparse attention", "block sparse", "faster attention", "speed up", "accelerate",
                                   "SpargeAttention", "加速", "稀疏注意力"))
def test_search_lists_apply_first(editor, words, screenshot):
    """Enter adds the first one."""
    found = editor.search(words, ["Apply SpargeAttn"])
    screenshot(editor, f"search_{words.replace(' ', '_')}")
    editor.close_dialogs()
    assert found[0] == "Apply SpargeAttn"


@pytest.mark.parametrize("words, node", (
    ("tune", "SpargeAttnTune"), ("tune sparge", "SpargeAttnTune"), ("sparge report", "SpargeAttnReport"),
    ("benchmark", "SpargeAttnBenchmark"), ("save sparge", "SpargeAttnSaveParams"),
    ("SpargeAttnLoadParams", "SpargeAttnLoadParams")))
def test_search_still_lists_the_others_first_where_they_are_meant(editor, words, node):
    title = translations("en")[node]["display_name"]
    found = editor.search(words, [title])
    editor.close_dialogs()
    assert found[0] == title


def test_search_for_the_name_finds_every_node(editor, screenshot):
    wanted = {translations("en")[node]["display_name"] for node in NODES + DEMO_NODES}
    found = editor.search("sparge", list(wanted))
    screenshot(editor, "search_every_node")
    editor.close_dialogs()
    assert set(found[:len(wanted)]) == wanted


# Titles of the nodes that reach into the place of the line that Apply SpargeAttn shows once it runs.
IN_THE_WAY = """() => app.graph._nodes.filter(node => node.type === 'ApplySpargeAttn').flatMap(apply => {
    const [left, top] = apply.pos, title = 30, line = 58
    const right = left + apply.size[0], bottom = top + apply.computeSize()[1] + line
    return app.graph._nodes.filter(node => node !== apply && node.pos[0] < right && node.pos[0] + node.size[0] > left &&
                                   node.pos[1] > top && node.pos[1] - title < bottom).map(node => node.title)
})"""


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
    assert not editor.run(IN_THE_WAY)
    report = editor.run("() => [...app.graph._nodes.find(node => node.type === 'SpargeAttnReport').size]")
    assert report[0] >= 480 and report[1] >= 800  # its picture is readable
    _, prompt = editor.export()
    assert prompt == json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
    editor.clear()


def test_tuned_parameters_have_a_colour_of_their_own(editor):
    """Whatever palette is loaded: each loads its own colours over those that were there."""
    colours = """() => [app.canvas.default_connection_color_byType, LGraphCanvas.link_type_colors].map(
        ({SPARGE_PARAMS: own, ...others}) => [own, Object.values(others).includes(own)])"""
    for palette in ("light", "dark"):
        editor.setting("Comfy.ColorPalette", palette)
        editor.page.wait_for_timeout(500)
        (socket, taken), (link, _) = editor.run(colours)
        assert socket == link and socket.startswith("#") and not taken
        assert editor.run("() => getComputedStyle(document.body).getPropertyValue('--color-datatype-SPARGE_PARAMS')") \
            .strip() == socket


@pytest.mark.parametrize("node, widget, typed", (
    ("ApplySpargeAttn", "selection.keep_percent", 12.3), ("ApplySpargeAttn", "pv_threshold", 15.5),
    ("ApplySpargeAttn", "start_percent", 0.15), ("SpargeAttnTune", "l1", 0.062), ("SpargeAttnTune", "min_gain", 0.15)))
def test_number_holds_what_is_typed(editor, node, widget, typed, screenshot):
    """A click opens a field; a double click alone changes nothing."""
    editor.place(node)
    value = "name => app.graph._nodes[0].widgets.find(widget => widget.name === name).value"
    default = editor.run(value, widget)
    editor.page.mouse.dblclick(*editor.middle(widget))
    field = editor.page.locator(".graphdialog input")
    field.wait_for()
    assert editor.run(value, widget) == default != typed
    field.fill(str(typed))
    screenshot(editor, f"number_{widget}")
    field.press("Enter")
    assert editor.run(value, widget) == typed
    editor.clear()


SEARCH = {name: {"class_type": kind, "inputs": inputs} for name, kind, inputs in (
    ("1", "UNETLoader", {"unet_name": "demo.safetensors", "weight_dtype": "default"}),
    ("2", "RandomConditioning", {"length": 11, "width": 64, "seed": 1}),
    ("3", "EmptyHunyuanLatentVideo", {"width": 256, "height": 128, "length": 13, "batch_size": 1}),
    ("4", "SpargeAttnTune", {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 1, "steps": 4,
        "cfg": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1, "l1": 0.1, "l2": 0.1,
        "sampled_steps": 1, "start_percent": 0, "end_percent": 1, "evaluate": False, "min_gain": 0.1,
        "min_tokens": 512}),
    ("5", "SpargeAttnSaveParams", {"params": ["4", 0], "filename": "found", "if_exists": "overwrite"}))}


def test_search_shows_the_time_left_and_its_picture(editor, screenshot):
    editor.run("prompt => app.loadApiJson(prompt, 'search')", SEARCH)
    editor.run("() => { const node = app.graph.getNodeById(4); node.pos = [300, 0]; app.canvas.selectNode(node);"
               "app.queuePrompt(0) }")
    text = "app.graph.getNodeById(4).widgets.map(widget => String(widget.value)).join()"
    patience = 8 * PATIENCE  # two busy cores search for minutes
    editor.page.wait_for_function(f"/about \\d+ (s|min) left/.test({text})", timeout=patience)
    editor.page.wait_for_function("app.graph.getNodeById(4).imgs?.length", timeout=patience)
    editor.fit()
    screenshot(editor, "search")
    editor.page.wait_for_function(f"/tuned: /.test({text})", timeout=patience)
    screenshot(editor, "search_finished")
    editor.clear()


def test_benchmark_shows_its_picture(editor, screenshot):
    """Where it opens, of the shape that is chosen; widgets of a custom one are there with it alone."""
    editor.place("SpargeAttnBenchmark")
    names = "() => app.graph._nodes[0].widgets.map(widget => widget.name)"
    assert not {"shape.heads", "shape.tokens"} & set(editor.run(names))
    editor.run("""() => {
        const find = name => app.graph._nodes[0].widgets.find(widget => widget.name === name)
        find('shape').value = 'custom'
        find('shape.tokens').value = 300
        find('shape.heads').value = 2
        app.queuePrompt(0)
    }""")
    assert {"shape.heads", "shape.head_dim", "shape.tokens"} <= set(editor.run(names))
    editor.page.wait_for_function("app.graph._nodes[0].imgs?.length")
    wide, tall = editor.run("() => { const [image] = app.graph._nodes[0].imgs;"
                            "return [image.naturalWidth, image.naturalHeight] }")
    assert wide == 768 and tall > 400
    wide, tall = editor.run("() => [...app.graph._nodes[0].size]")
    assert wide >= 600 and tall >= 1000  # the picture is readable
    editor.page.wait_for_function("app.graph._nodes[0].widgets.some(widget => /no fast kernels/.test(widget.value))")
    editor.fit()
    screenshot(editor, "benchmark")
    editor.clear()


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parts[0]}/{path.stem}")
def test_saved_workflow_means_what_it_meant(editor, path):
    """It loads, and what the editor makes of it has every value of the prompt that was exported with it then."""
    workflow = json.loads((HOST / "saved" / path).read_text(encoding="utf-8"))
    expected = json.loads((HOST / "saved" / path.parts[0] / "prompts" / path.name).read_text(encoding="utf-8"))
    editor.run("workflow => app.loadGraphData(workflow)", workflow)
    _, prompt = editor.export()
    editor.clear()
    assert {key: node["class_type"] for key, node in prompt.items()} == \
        {key: node["class_type"] for key, node in expected.items()}
    for key, node in expected.items():
        inputs = prompt[key]["inputs"]
        assert {name: inputs.get(name) for name in node["inputs"]} == node["inputs"], node["class_type"]


def test_an_empty_line_of_text_shows_an_example(editor, screenshot):
    """In the editor's new nodes; the canvas draws none."""
    editor.setting("Comfy.VueNodes.Enabled", True)
    editor.place("SpargeAttnReport")
    screenshot(editor, "placeholder")
    editor.page.get_by_placeholder("12 or single:3").wait_for()
    editor.setting("Comfy.VueNodes.Enabled", False)
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
    # The editor adds the control of a seed, and calls it by its default.
    widgets = [(name, label) for name, label in shown["widgets"] if name not in ("control_after_generate", "fixed")]
    names = {name.replace(".", "_"): label for name, label in widgets}
    assert names == {name: expected["inputs"][name]["name"] for name in names}
    # It takes a second to show one. The editor takes the translations of all from the same place.
    for name, _ in widgets if language == "en" else widgets[::4]:
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

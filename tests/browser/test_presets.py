"""The presets of Apply SpargeAttn in ComfyUI's editor, with and without this pack's script, and in files.

Every stage leaves screenshots in the folder that SPARGEATTN_SCREENSHOTS names.
"""
import json

import pytest

from comfyui_spargeattn.nodes.call.plan import DENSE_STEPS
from comfyui_spargeattn.nodes.presets import CUSTOM, DEFAULTS, OF_A_NEW_NODE, PRESETS, WITHOUT
from comfyui_spargeattn.tests.browser.editor import Editor, browser
from comfyui_spargeattn.tests.nodes.host import comfy_server

pytestmark = pytest.mark.comfy
HOST = comfy_server.REPOSITORY / "tests/nodes/host/saved"
SAVED = sorted(path.relative_to(HOST) for path in HOST.glob("*/workflows/*.json"))
NODE = "ApplySpargeAttn"
FIND = f"const node = app.graph._nodes.find(node => node.type === '{NODE}')"
NEWER = {"refreshes": 0, "dense_steps": DENSE_STEPS[0]}  # than some of the files here, with what they mean there
OTHER, TOPK = (next(name for name, preset in PRESETS.items() if preset.inputs["selection"]["selection"] == selection)
               for selection in ("cdf", "topk"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("presets")
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


@pytest.fixture(scope="module")
def bare_editor(server, chromium):
    """An editor that has the node, and not the script that shows its presets."""
    return Editor(chromium, server.url, blocked="**/presets.js")


@pytest.fixture(params=("canvas", "Vue"))
def kind(editor, request):
    """Both ways in which the editor draws nodes."""
    editor.setting("Comfy.VueNodes.Enabled", request.param == "Vue")
    editor.page.wait_for_timeout(500)
    yield request.param
    editor.setting("Comfy.VueNodes.Enabled", False)


def values(editor):
    """{name: value} of the first Apply SpargeAttn's widgets, in the order in which they are shown."""
    return dict(editor.run(f"() => {{ {FIND}; return node.widgets.map(widget => [widget.name, widget.value]) }}"))


def shows(editor, preset):
    shown = values(editor)
    return {name: shown[name] for name in ("preset", *PRESETS[preset].widgets)} == \
        {"preset": preset, **PRESETS[preset].widgets}


def choose(editor, kind, name, value):
    """Choose a value of a combo, as a user does."""
    if kind == "canvas":
        editor.page.mouse.click(*editor.middle(name))
        editor.page.locator(".litemenu-entry", has_text=value).first.click()
    else:
        editor.page.locator(f"[data-testid='node-widget']:has-text('{name}') [role=combobox]").first.click()
        editor.page.get_by_role("option", name=value, exact=True).click()
    editor.page.wait_for_timeout(300)


def type_number(editor, kind, name, value):
    if kind == "canvas":
        editor.page.mouse.click(*editor.middle(name))
        field = editor.page.locator(".graphdialog input")
    else:
        field = editor.page.locator(f"[data-testid='node-widget']:has-text('{name.split('.')[-1]}') input").first
    field.fill(str(value))
    field.press("Enter")
    editor.page.wait_for_timeout(300)


def test_a_new_node_shows_its_preset_first(editor, kind, screenshot):
    editor.place(NODE)
    screenshot(editor, f"preset_new_{kind}")
    assert shows(editor, OF_A_NEW_NODE)
    names = list(values(editor))
    assert names[0] == "preset" and set(names[1:9]) == {*PRESETS[OF_A_NEW_NODE].widgets, "end_percent"}


def test_a_preset_sets_the_widgets_and_a_turned_widget_makes_it_custom(editor, kind, screenshot):
    editor.place(NODE)
    for preset in (*PRESETS, OTHER):
        choose(editor, kind, "preset", preset)
        screenshot(editor, f"preset_{preset}_{kind}")
        assert shows(editor, preset)
    type_number(editor, kind, "selection.cdf_threshold", 0.123)
    screenshot(editor, f"preset_turned_{kind}")
    assert values(editor) == values(editor) | PRESETS[OTHER].widgets | {"preset": CUSTOM,
                                                                        "selection.cdf_threshold": 0.123}
    choose(editor, kind, "preset", OTHER)
    choose(editor, kind, "selection", "topk")
    assert values(editor)["preset"] == CUSTOM and "selection.keep_percent" in values(editor)
    type_number(editor, kind, "selection.keep_percent", 12)
    screenshot(editor, f"preset_topk_{kind}")
    for preset, name, gone in ((OTHER, "cdf_threshold", "keep_percent"), (TOPK, "keep_percent", "cdf_threshold")):
        choose(editor, kind, "preset", preset)
        assert shows(editor, preset) and f"selection.{gone}" not in values(editor)
        type_number(editor, kind, f"selection.{name}", 0.5)  # made anew by the preset
        assert values(editor)["preset"] == CUSTOM and values(editor)[f"selection.{name}"] == 0.5


def test_other_widgets_leave_the_preset(editor):
    editor.place(NODE)
    type_number(editor, "canvas", "end_percent", 0.9)
    choose(editor, "canvas", "hilbert", "off")
    assert shows(editor, OF_A_NEW_NODE) and values(editor)["hilbert"] == "off"


@pytest.mark.parametrize("type_of_node", (NODE, "SpargeAttnTune"))
def test_start_and_end_push_each_other(editor, kind, type_of_node):
    def window():
        return editor.run("() => app.graph._nodes[0].widgets.filter(({name}) => ['start_percent', 'end_percent', "
                          "'preset'].includes(name)).map(widget => widget.value)")

    editor.place(type_of_node)
    *preset, start, _ = window()
    type_number(editor, kind, "end_percent", 0.9)
    assert window() == [*preset, start, 0.9]
    type_number(editor, kind, "end_percent", 0.01)
    assert window()[-2:] == [0.01, 0.01]
    type_number(editor, kind, "start_percent", 0.6)
    assert window()[-2:] == [0.6, 0.6]
    if preset:
        assert window()[0] == CUSTOM


def test_a_linked_widget_makes_it_custom(editor):
    editor.place(NODE)
    editor.run(f"""() => {{ {FIND}
        const number = LiteGraph.createNode('PrimitiveFloat')
        app.graph.add(number)
        number.connect(0, node, node.inputs.findIndex(input => input.name === 'selection.keep_percent'))
    }}""")
    assert values(editor)["preset"] == CUSTOM


def test_copies_and_undone_steps_have_the_values(editor):
    editor.place(NODE)
    choose(editor, "canvas", "preset", OTHER)
    type_number(editor, "canvas", "pv_threshold", 20)
    before = values(editor)
    copied = editor.run(f"() => {{ {FIND}; return node.clone().widgets.map(widget => [widget.name, widget.value]) }}")
    assert dict(copied) == before
    type_number(editor, "canvas", "start_percent", 0.45)
    assert values(editor)["preset"] == CUSTOM
    editor.page.mouse.click(1000, 800)
    editor.page.keyboard.press("Control+z")
    editor.page.wait_for_timeout(1000)
    assert values(editor) == before


def test_a_file_has_the_definitions_order(editor, server):
    """Whatever the editor shows first, so that editors without the script put every value in its place."""
    editor.place(NODE)
    choose(editor, "canvas", "preset", OTHER)
    workflow, prompt = editor.export()
    [node] = workflow["nodes"]
    order = server.get(f"/object_info/{NODE}")[NODE]["input_order"]["optional"]
    inputs = prompt[str(node["id"])]["inputs"]
    names = [name for entry in order for name in inputs if name.split(".")[0] == entry]
    assert dict(zip(names, node["widgets_values"])) == inputs and len(names) == len(node["widgets_values"])
    assert names[-1] == "preset" and inputs["preset"] == OTHER


def reload(editor, workflow):
    editor.run("workflow => app.loadGraphData(workflow)", workflow)
    editor.page.wait_for_timeout(300)


@pytest.mark.parametrize("preset", (*PRESETS, CUSTOM))
def test_a_file_survives_editors_with_and_without_the_script(editor, bare_editor, preset):
    editor.place(NODE)
    choose(editor, "canvas", "preset", preset)
    type_number(editor, "canvas", "pv_threshold", 20)
    expected = values(editor)
    for next_editor in (editor, bare_editor, bare_editor, editor):
        workflow, _ = editor.export()
        reload(next_editor, workflow)
        assert values(next_editor) == expected
        editor = next_editor


def test_without_the_script_a_new_node_is_custom(bare_editor, screenshot):
    """What its widgets show is what runs."""
    bare_editor.place(NODE)
    screenshot(bare_editor, "preset_without_script")
    shown = values(bare_editor)
    assert shown["preset"] == CUSTOM and shown["refreshes"] == DEFAULTS["refreshes"]
    assert shown["selection.cdf_threshold"] == DEFAULTS["selection"]["cdf_threshold"]


def unnamed(workflow):
    """As an editor of an earlier time has saved it: values by position alone."""
    for node in workflow["nodes"]:
        node.pop("widgets_values_named", None)
    return workflow


WAYS = "named", "unnamed", "by name", "without script"


@pytest.mark.parametrize("path, way", [(path, WAYS[i % len(WAYS)]) for i, path in enumerate(SAVED)], ids=str)
def test_a_file_without_a_preset_is_custom(editor, bare_editor, path, way, screenshot):
    """Its values are those that its prompt had; what it lacks is off."""
    workflow = json.loads((HOST / path).read_text(encoding="utf-8"))
    expected = json.loads((HOST / path.parts[0] / "prompts" / path.name).read_text(encoding="utf-8"))
    used = bare_editor if way == "without script" else editor
    used.setting("Comfy.Workflow.NamedValuesRestore", way == "by name")
    reload(used, workflow if way in ("named", "by name") else unnamed(workflow))
    if way == "named":
        used.fit()
        screenshot(used, f"preset_saved_{path.parts[0]}_{path.stem}")
    _, prompt = used.export()
    used.setting("Comfy.Workflow.NamedValuesRestore", False)
    applied = {key: node["inputs"] for key, node in expected.items() if node["class_type"] == NODE}
    assert applied
    for key, inputs in applied.items():
        assert prompt[key]["inputs"] == {**NEWER, **inputs, "preset": CUSTOM}


def test_values_that_a_file_has_are_kept(editor):
    """Also those that the files here have at their defaults."""
    workflow = unnamed(json.loads((HOST / SAVED[-1]).read_text(encoding="utf-8")))
    nodes = [node for node in workflow["nodes"] if node["type"] == NODE]
    for node in nodes:
        node["widgets_values"][-1] = 7  # refreshes
    reload(editor, workflow)
    assert values(editor)["refreshes"] == 7 and values(editor)["preset"] == CUSTOM


@pytest.mark.parametrize("by_name", (False, True), ids=("by place", "by name"))
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_in_a_file_has_the_values_of_today(editor, preset, by_name):
    """As on the server, whatever the preset was when the file was saved."""
    editor.place(NODE)
    choose(editor, "canvas", "preset", CUSTOM)
    choose(editor, "canvas", "selection", "cdf")
    workflow, _ = editor.export()
    [node] = workflow["nodes"]
    for name, value in (("selection.cdf_threshold", 0.321), ("start_percent", 0.654), ("preset", preset)):
        at = node["widgets_values"].index(node["widgets_values_named"][name])
        node["widgets_values"][at] = node["widgets_values_named"][name] = value
    editor.setting("Comfy.Workflow.NamedValuesRestore", by_name)
    reload(editor, workflow)
    editor.setting("Comfy.Workflow.NamedValuesRestore", False)
    assert shows(editor, preset)


@pytest.mark.parametrize("preset", (*PRESETS, None))
def test_a_prompt_opens_as_it_runs(editor, preset):
    """The editor makes nodes of a prompt (API). One of today has no preset, older ones have no refreshes."""
    path = HOST / "0.1.0/prompts/wan2.1_text_to_video.json"
    prompt = json.loads(path.read_text(encoding="utf-8"))
    [key] = [key for key, node in prompt.items() if node["class_type"] == NODE]
    expected = {**NEWER, **prompt[key]["inputs"], "preset": CUSTOM}
    if preset:
        prompt[key]["inputs"]["preset"] = preset
        kept = {name: value for name, value in expected.items() if not name.startswith("selection.")}
        expected = {**kept, **PRESETS[preset].widgets, "preset": preset}
    editor.run("prompt => app.loadApiJson(prompt, 'prompt')", prompt)
    _, opened = editor.export()
    assert opened[key]["inputs"] == expected
    editor.clear()


def test_a_prompt_with_nothing_opens_as_it_runs(editor):
    editor.run("prompt => app.loadApiJson(prompt, 'prompt')", {"1": {"class_type": NODE, "inputs": {}}})
    shown = values(editor)
    assert {name: shown.get(name) for name in WITHOUT.widgets} == WITHOUT.widgets and shown["preset"] == CUSTOM
    editor.clear()


@pytest.mark.parametrize("before", (*PRESETS, CUSTOM))
@pytest.mark.parametrize("preset", PRESETS)
def test_a_prompt_with_a_preset_alone_opens(editor, preset, before):
    """Whatever a prompt before it has left of a node with the same number."""
    for opened in (before, preset):
        editor.run("prompt => app.loadApiJson(prompt, 'prompt')",
                   {"1": {"class_type": NODE, "inputs": {"preset": opened}}})
    assert shows(editor, preset)
    editor.clear()

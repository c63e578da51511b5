"""The presets: what holds of them and of a prompt, and whether texts and examples say what the table says."""
import json
from itertools import combinations

import pytest

from comfyui_spargeattn.nodes.presets import CUSTOM, DEFAULTS, OF_A_NEW_NODE, PRESETS, Preset, chosen
from comfyui_spargeattn.tests.browser.tools.examples import EXAMPLES
from comfyui_spargeattn.tests.nodes import preset_texts

NODE = "ApplySpargeAttn"
ROWS = {  # of the README's table of models, with an example of each
    "MiniMax-H3": "minimax_h3_text_to_video", "Wan 2.1, 2.2": "wan2.1_text_to_video",
    "HunyuanVideo": "hunyuan_video_1.5_text_to_video", "Mochi, LTX-Video, LTX-2": "ltx_video_text_to_video",
    "FLUX.1 dev, Kontext": "flux_dev_text_to_image", "Qwen-Image": "qwen_image_text_to_image",
    "SD3.5, SDXL": "sd3.5_text_to_image"}
OWN = {"selection": {"selection": "topk", "keep_percent": 12.0, "similarity_threshold": 0.4}, "start_percent": 0.11,
       "skipped_blocks": "drop", "refreshes": 9, "dense_steps": "model"}
NOTHING = dict.fromkeys(OWN)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_whatever_a_prompt_gives(preset):
    expected = PRESETS[preset].inputs
    assert chosen(preset, NOTHING) == (expected, {})
    assert chosen(preset, expected) == (expected, {})
    assert chosen(preset, OWN) == (expected, {name: value for name, value in OWN.items() if value != expected[name]})
    one = {"refreshes": expected["refreshes"] + 1}
    assert chosen(preset, expected | one) == chosen(preset, NOTHING | one) == (expected, one)


def test_custom_is_what_a_prompt_gives():
    assert chosen(CUSTOM, OWN) == (OWN, {})
    assert chosen(CUSTOM, NOTHING) == (DEFAULTS, {})
    assert chosen(CUSTOM, OWN | {"refreshes": None}) == (OWN | {"refreshes": 0}, {})
    assert chosen(CUSTOM, OWN | {"start_percent": 0.0})[0]["start_percent"] == 0


def test_what_is_no_preset_is_refused():
    with pytest.raises(ValueError, match=f"preset must be one of .*{CUSTOM}; got 'fastest'"):
        chosen("fastest", NOTHING)


def test_presets_differ():
    assert list(PRESETS) == ["quality", "balanced", "fast"] and OF_A_NEW_NODE in PRESETS
    assert all(a != b for a, b in combinations(PRESETS.values(), 2))


def test_widgets_of_a_preset_have_the_names_of_a_prompt():
    preset = Preset(OWN["selection"], skipped_blocks="drop", start_percent=0.11, refreshes=9, dense_steps="model")
    assert preset.widgets == {"selection": "topk", "selection.keep_percent": 12.0,
                              "selection.similarity_threshold": 0.4, "skipped_blocks": "drop", "start_percent": 0.11,
                              "refreshes": 9, "dense_steps": "model"}


def test_what_holds_may_be_changed_without_a_change_of_the_table():
    """Of a dictionary that is handed out."""
    chosen(OF_A_NEW_NODE, NOTHING)[0]["selection"]["selection"] = "other"
    assert chosen(OF_A_NEW_NODE, NOTHING)[0]["selection"]["selection"] != "other"


@pytest.mark.parametrize("path", preset_texts.PAGES, ids=lambda path: path.name)
def test_text_has_the_table_of_today(path):
    """`python -m tests.nodes.preset_texts` brings the texts up to date."""
    text = path.read_text(encoding="utf-8")
    assert text.count(preset_texts.table()) == 1, f"the presets in {path.relative_to(preset_texts.ROOT)} are stale"


def test_table_of_a_text_is_replaced():
    old = f"before\n\n{preset_texts.HEAD}old` |\n|---|---|\n| `quality` | 0.123 |\n| `gone` | 1 |\n\nafter\n"
    assert preset_texts.with_table(old) == f"before\n\n{preset_texts.table()}\nafter\n"
    other = "| `preset` | sets other widgets |\n"
    assert preset_texts.with_table(other) == other


def applied(example):
    """Of each Apply SpargeAttn of an example: the widgets that presets set, and the preset."""
    for node in example.nodes.values():
        if node["type"] == NODE:
            preset = node["widgets"].get("preset", OF_A_NEW_NODE)
            values = PRESETS[preset].widgets
            shown = {name: node["widgets"].get(name, value) for name, value in values.items()}
            yield shown | {"preset": preset if shown == values else CUSTOM}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_has_the_presets_of_today(name):
    """`python -m tests.browser.tools.make_workflows` makes the examples again."""
    workflow, prompt = (json.loads((preset_texts.ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))
                        for folder in ("workflows", "tests/nodes/host/prompts"))
    expected = list(applied(EXAMPLES[name]))
    inputs = [node["inputs"] for node in prompt.values() if node["class_type"] == NODE]
    named = [node["widgets_values_named"] for node in workflow["nodes"] if node["type"] == NODE]
    for values in (inputs, named):
        found = [{key: entry.get(key) for key in entry_expected} for entry, entry_expected in zip(values, expected)]
        assert len(values) == len(expected) > 0 and found == expected, f"the presets in {name}.json are stale"


@pytest.mark.parametrize("models, name", ROWS.items())
def test_readme_recommends_what_the_example_has(models, name):
    [widgets] = [node["widgets"] for node in EXAMPLES[name].nodes.values() if node["type"] == NODE]
    turned = [f"`{widget}` {value}" for widget, value in widgets.items() if widget != "preset"]
    start = ", ".join([f"`{widgets.get('preset', OF_A_NEW_NODE)}`", *turned])
    assert f"| {models} | {start} |" in (preset_texts.ROOT / "README.md").read_text(encoding="utf-8")

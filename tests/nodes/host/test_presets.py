"""What ComfyUI makes of prompts with and without a preset: of today's and older ones exactly what they meant."""
import asyncio
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import checkpoints
import comfy_host
import pytest
from sampling import node_class

SAVED = {f"{path.parents[1].name}/{path.stem}": json.loads(path.read_text(encoding="utf-8"))
         for path in (Path(__file__).parent / "saved").glob("*/prompts/*.json")}
BEFORE = {"selection": "cdf", "selection.cdf_threshold": 0.8, "selection.similarity_threshold": -1.0,
          "start_percent": 0.2, "skipped_blocks": "pooled", "refreshes": 6}  # the preset balanced, of an earlier time
OWN = {"selection": "topk", "selection.keep_percent": 12.0, "selection.similarity_threshold": 0.4,
       "start_percent": 0.11, "skipped_blocks": "drop", "refreshes": 9}


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(checkpoints.FAMILIES["wan"], tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def presets(comfy_nodes):
    return comfy_host.pack_module(comfy_nodes, "nodes.presets")


def errors(**inputs):
    """(widget, message) of what the editor shows at the node before the prompt runs."""
    import execution

    prompt = {"loader": {"class_type": "UNETLoader", "inputs": {"unet_name": "", "weight_dtype": "default"}},
              "patch": {"class_type": "ApplySpargeAttn", "inputs": {"model": ["loader", 0], **inputs}}}
    _, found, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "patch", {}))
    return [(error["extra_info"]["input_name"], error["details"]) for error in found]


def settings(comfy_nodes, model, inputs):
    """The NodeSettings, as a dictionary, that ComfyUI lets the node make of a prompt's inputs."""
    import execution
    from comfy_api.latest._io import build_nested_inputs

    node = node_class(comfy_nodes)
    own = {name: value for name, value in inputs.items() if not isinstance(value, list)}
    data, _, paths = execution.get_input_data(own, node, "patch")
    values = build_nested_inputs({name: value for name, [value] in data.items()}, paths)
    patched = node.execute(model=model, **values).result[0]
    return asdict(patched.model_options["transformer_options"]["optimized_attention_override"].settings)


@pytest.mark.parametrize("name", sorted(SAVED))
def test_a_prompt_without_a_preset_means_what_it_meant(comfy_nodes, wan, name):
    plan = comfy_host.pack_module(comfy_nodes, "nodes.call.plan")
    applied = [node["inputs"] for node in SAVED[name].values() if node["class_type"] == "ApplySpargeAttn"]
    assert applied
    for inputs in applied:
        assert inputs["selection"] == "cdf" and inputs["pv_threshold"] == 50 and "preset" not in inputs
        params = plan.SpargeParams(cdf_threshold=inputs["selection.cdf_threshold"], pv_threshold=math.inf,
                                   similarity_threshold=inputs["selection.similarity_threshold"])
        expected = plan.NodeSettings(
            params, inputs["start_percent"], inputs["end_percent"], plan.ListedBlocks.parse(inputs["dense_blocks"]),
            inputs["min_tokens"], inputs["skipped_blocks"], inputs["pv_precision"], inputs["verbose"],
            inputs["hilbert"], None, inputs.get("refreshes", 0))
        assert settings(comfy_nodes, wan, inputs) == asdict(expected)


@pytest.mark.parametrize("preset", ("quality", "balanced", "fast"))
def test_a_preset_alone_is_its_values(comfy_nodes, wan, presets, caplog, preset):
    """And each of its values is one that the widget takes."""
    values = presets.PRESETS[preset].widgets
    assert errors(preset=preset) == errors(**values) == []
    with caplog.at_level(logging.INFO):
        alone = settings(comfy_nodes, wan, {"preset": preset})
        assert alone == settings(comfy_nodes, wan, values) == settings(comfy_nodes, wan, {"preset": preset, **values})
    assert not [line for line in caplog.messages if "preset" in line]
    assert alone["refreshes"] == values["refreshes"] and alone["skipped"] == values["skipped_blocks"]
    if values["selection"] == "cdf":
        assert alone["params"]["cdf_threshold"] == values["selection.cdf_threshold"]
    else:
        assert alone["params"]["topk"] == values["selection.keep_percent"] / 100


@pytest.mark.parametrize("preset", ("quality", "balanced", "fast"))
def test_a_preset_with_the_values_of_an_earlier_time_is_that_of_today(comfy_nodes, wan, preset):
    assert errors(preset=preset, **BEFORE) == []
    assert settings(comfy_nodes, wan, {"preset": preset, **BEFORE}) == settings(comfy_nodes, wan, {"preset": preset})


@pytest.mark.parametrize("scheduler", ("simple", "normal", "beta", "sgm_uniform", "karras", "ddim_uniform"))
def test_twenty_steps_are_enough_for_refreshes(comfy_nodes, wan, presets, scheduler):
    """Whatever share of them the scheduler leaves below the noise levels that stay dense."""
    import comfy.samplers

    inputs = presets.PRESETS["balanced"].inputs
    sampling = wan.get_model_object("model_sampling")
    levels = comfy.samplers.calculate_sigmas(sampling, scheduler, 20).tolist()
    window, refresh = (comfy_host.pack_module(comfy_nodes, f"nodes.run.{name}")
                       for name in ("sigma_window", "refresh_schedule"))
    lowest, highest = window.sigma_range(inputs["start_percent"], 1.0, sampling.percent_to_sigma)
    schedule = refresh.RefreshSchedule(inputs["refreshes"])
    schedule.begin(levels, lowest, highest, float(sampling.percent_to_sigma(0.0)))
    assert not schedule.problem and inputs["refreshes"] <= len(schedule.levels) <= inputs["refreshes"] + 1


def test_values_that_a_preset_does_not_read_are_told(comfy_nodes, wan, caplog):
    with caplog.at_level(logging.INFO):
        given = settings(comfy_nodes, wan, {"preset": "fast", **OWN, "end_percent": 0.9, "dense_blocks": "3"})
    [line] = [line for line in caplog.messages if "preset" in line]
    assert "preset fast sets selection, start_percent" in line and "12.0" in line
    read = {"end_percent": 0.9, "dense_blocks": "3"}
    assert given == settings(comfy_nodes, wan, {"preset": "fast", **read}) != settings(comfy_nodes, wan, read)


def test_custom_reads_the_widgets(comfy_nodes, wan):
    found = settings(comfy_nodes, wan, {"preset": "custom", **OWN})
    assert found == settings(comfy_nodes, wan, OWN)
    assert found["params"]["topk"] == 0.12 and found["refreshes"] == 9
    assert found["start_percent"] == 0.11 and found["skipped"] == "drop"


def test_an_unknown_preset_is_one_error_at_its_widget(comfy_nodes, wan):
    [(widget, message)] = errors(preset="fastest")
    assert widget == "preset" and "fastest" in message
    with pytest.raises(ValueError, match="preset must be one of .*; got 'fastest'"):  # linked from another node
        settings(comfy_nodes, wan, {"preset": "fastest"})


def test_a_prompt_with_nothing_has_what_the_widgets_show(comfy_nodes, wan):
    """Without the editor's script, a new node is one."""
    shown = {}
    for entry in node_class(comfy_nodes).define_schema().inputs:
        if entry.id == "selection":
            shown |= {entry.id: entry.options[0].key} | {f"selection.{inner.id}": inner.default
                                                         for inner in entry.options[0].inputs}
        elif entry.id not in ("model", "params"):
            shown[entry.id] = entry.default
    assert shown["preset"] == "custom" and errors() == errors(**shown) == []
    assert settings(comfy_nodes, wan, {}) == settings(comfy_nodes, wan, shown)


def test_files_have_the_preset_last(comfy_nodes):
    """The values of older files keep their places."""
    inputs = node_class(comfy_nodes).define_schema().inputs
    assert [entry.id for entry in inputs if not entry.optional] == ["model"] and inputs[-1].id == "preset"

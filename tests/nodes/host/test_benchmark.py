"""Benchmark SpargeAttn in a real ComfyUI: in a prompt on a server, and what becomes of its file."""
import json
import logging

import comfy_host
import comfy_server
import pytest
import torch
from PIL import Image
from test_server import cpu_option, node

WIDGETS = {"pv_precision": "auto", "tune": True, "seconds": 20, "theme": "dark"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("benchmark")
    comfy_host.prepare_base_directory(base)
    file = base / "user/__spargeattn/launch_configurations.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"format": 1, "configurations": [{"card": "another"}]}')
    with comfy_server.running(base, *cpu_option()) as running:
        yield running


def measured(server, **widgets):
    """The text, and the picture as saved by another node, of a prompt with the node alone."""
    prompt = {"bench": node("SpargeAttnBenchmark", **WIDGETS | widgets),
              "save": node("SaveImage", images=["bench", 0], filename_prefix="bench")}
    entry, errors = server.run(prompt)
    assert not errors and entry["status"]["status_str"] == "success", entry["status"]
    shown = entry["outputs"]["bench"]
    preview = server.base / "temp" / shown["images"][0]["filename"]
    saved = server.base / "output" / entry["outputs"]["save"]["images"][0]["filename"]
    with Image.open(preview) as picture, Image.open(saved) as saved:
        assert picture.size == saved.size and picture.width == 768 and picture.height > 400
    return shown["text"][0]


def test_in_a_prompt(server):
    text = measured(server, shape="Flux.1 1024x1024")
    for wanted in ("ComfyUI's attention_", "SpargeAttn, all blocks", "SpargeAttn, 10% of the", torch.__version__):
        assert wanted in text
    if not torch.cuda.is_available():
        assert "nothing to tune: no kernels for device type cpu" in text
        assert "Flux.1 1024x1024: 2 heads × 512 tokens × 128" in text
    # Queued again, it measures again.
    again = measured(server, shape="Flux.1 1024x1024")
    assert again != text and server.log().count("SpargeAttn: benchmark\n") == 2


def test_custom_shape(server):
    text = measured(server, **{"shape": "custom", "shape.heads": 3, "shape.head_dim": 40, "shape.tokens": 300})
    assert "custom: 2 heads × 300 tokens × 40" in text or torch.cuda.is_available()


def test_a_file_that_can_not_be_used_is_told_once_at_load(server):
    assert server.log().count("launch_configurations.json are ignored: a configuration must be an object of") == 1


def own(comfy_nodes):
    """The node's class, and its module."""
    return (comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnBenchmark"],
            comfy_host.pack_module(comfy_nodes, "nodes.benchmark_node"))


@pytest.mark.parametrize("broken", ("draw_benchmark", "run", "measured_file"))
def test_a_failure_ends_no_prompt(comfy_nodes, monkeypatch, caplog, broken):
    kind, module = own(comfy_nodes)
    monkeypatch.setattr(module, broken, lambda *arguments: 1 / 0)
    out = kind.execute({"shape": "SDXL 1024x1024"}, "auto", False, 10, "light")
    assert out.args[0].shape[0] == 1 and out.args[1] == "The benchmark failed: division by zero"
    assert "the benchmark failed" in caplog.text


def test_the_user_stops_it(comfy_nodes):
    import comfy.model_management as manager
    kind, _ = own(comfy_nodes)
    manager.interrupt_current_processing(True)
    with pytest.raises(manager.InterruptProcessingException):
        kind.execute({"shape": "SDXL 1024x1024"}, "auto", False, 10, "light")
    manager.interrupt_current_processing(False)


def test_a_file_of_another_card_is_told_once(comfy_nodes, caplog, tmp_path):
    """What a restart reads of a user folder that has moved."""
    measured = comfy_host.pack_module(comfy_nodes, "kernels._triton.measured")
    config = comfy_host.pack_module(comfy_nodes, "kernels._triton.config")
    launch = {"warps": 4, "stages": 2, "maxnreg": None}
    entry = {"card": "another", "triton": "3.6", "padded_dim": 128, "pv_format": "int8", "block_q": 128, "block_k": 64,
             "table": launch, "launch": launch, "gain": 1.5}
    (tmp_path / "file").write_text(json.dumps({"format": 1, "configurations": [entry]}))
    table = config.attend_config("sm89", 128, "int8")
    with caplog.at_level(logging.INFO):
        measured.load_configurations(tmp_path / "file")
        assert [measured.configuration(torch.device("cpu"), table, 128, "int8") for _ in range(3)] == [table] * 3
    measured.load_configurations(tmp_path / "none")
    assert len(caplog.messages) == 1 and "those of others are ignored" in caplog.messages[0]

"""The pack as ComfyUI finds it: a folder in custom_nodes under a name Python could not import."""
import logging
import sys

import comfy_host
import pytest
import torch
from sampling import node_class, widget_defaults


def test_loads_from_a_folder_with_hyphens_and_dots(comfy_nodes):
    assert node_class(comfy_nodes).RELATIVE_PYTHON_MODULE == f"custom_nodes.{comfy_host.PACK_FOLDER}"
    assert comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS["ApplySpargeAttn"] == "Apply SpargeAttn"


def test_leaves_comfyuis_own_module_names_alone(comfy_nodes):
    for name in ("nodes", "comfy", "kernels", "hilbert"):
        assert str(comfy_host.REPOSITORY) not in str(getattr(sys.modules.get(name), "__file__", ""))
    assert str(comfy_host.REPOSITORY) not in sys.path


def test_schema_is_what_saved_workflows_rely_on(comfy_nodes):
    """A saved workflow stores the widgets' values by position: new ones may only be appended."""
    schema = node_class(comfy_nodes).define_schema()
    assert [entry.id for entry in schema.inputs][:10] == [
        "model", "selection", "pv_threshold", "start_percent", "end_percent", "skipped_blocks", "pv_precision",
        "dense_blocks", "min_tokens", "verbose"]
    assert schema.category == "model/patch/SpargeAttn"
    selection = next(entry for entry in schema.inputs if entry.id == "selection")
    assert {option.key: [inner.id for inner in option.inputs] for option in selection.options} == {
        "cdf": ["cdf_threshold", "similarity_threshold"], "topk": ["keep_percent", "similarity_threshold"]}


def test_every_widget_has_a_tooltip_and_a_default(comfy_nodes):
    node = node_class(comfy_nodes)
    defaults = widget_defaults(node)
    for entry in node.define_schema().inputs:
        assert entry.tooltip, entry.id
        assert entry.id in defaults or entry.id == "model" or entry.optional, entry.id


@pytest.mark.parametrize("words", ("sage", "sage attention", "sparse attention", "speed up", "accelerate", "加速",
                                   "稀疏注意力"))
def test_what_people_search_for_finds_apply_alone(comfy_nodes, words):
    """The editor would list other nodes with these words before it."""
    own = {name: node for name, node in comfy_nodes.NODE_CLASS_MAPPINGS.items()
           if "SpargeAttn" in name and "Demo" not in name}  # the example alone needs the demo's
    assert len(own) == 6
    assert [name for name, node in own.items() if words in node.define_schema().search_aliases] == ["ApplySpargeAttn"]


@pytest.mark.parametrize("arch,triton,line", (
    ("sm90", (3, 6), "fast kernels: Triton 3.6, cpu (sm90), P·V in INT8"),
    ("gfx1100", (3, 6), "fast kernels: Triton 3.6, cpu (gfx1100), P·V in FP16"),
    ("sm90", None, "no fast kernels here: Triton is not installed (pip install triton"),
    ("sm75", (3, 6), "no fast kernels here: compute capability sm75 < sm80"),
    (None, (3, 6), "no fast kernels here: no kernels for device type cpu")))
def test_load_tells_whether_there_are_fast_kernels(comfy_nodes, monkeypatch, caplog, arch, triton, line):
    host = comfy_host.pack_module(comfy_nodes, "nodes.host")
    monkeypatch.setattr(host.comfy.model_management, "get_torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(host, "arch_of", lambda device: arch)
    monkeypatch.setattr(host, "has_triton", lambda: triton is not None)
    monkeypatch.setattr(host, "triton_version", lambda: triton)
    with caplog.at_level(logging.INFO):
        host.log_fast_kernels()
    [said] = caplog.messages
    assert said.startswith(f"SpargeAttn: {line}")


def test_a_driver_that_fails_does_not_keep_the_pack_from_loading(comfy_nodes, monkeypatch, caplog):
    host = comfy_host.pack_module(comfy_nodes, "nodes.host")
    monkeypatch.setattr(host, "arch_of", lambda device: 1 / 0)
    with caplog.at_level(logging.INFO):
        host.log_fast_kernels()
    assert not caplog.messages

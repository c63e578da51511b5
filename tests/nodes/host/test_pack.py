"""The pack as ComfyUI finds it: a folder in custom_nodes under a name Python could not import."""
import sys

import comfy_host
import pytest
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


@pytest.mark.parametrize("words", ("sparge", "sage", "sparse attention", "speed up", "accelerate", "加速",
                                   "稀疏注意力"))
def test_every_node_is_found_by_what_people_search_for(comfy_nodes, words):
    own = [node for name, node in comfy_nodes.NODE_CLASS_MAPPINGS.items()
           if "SpargeAttn" in name and "Demo" not in name]  # the example alone needs the demo's
    assert len(own) == 5
    for node in own:
        assert words in node.define_schema().search_aliases, node

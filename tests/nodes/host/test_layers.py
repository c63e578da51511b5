"""Tuned layers keep their thresholds, whatever else is on the model: read off the arguments of the kernels."""
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import checkpoints
import comfy_host
import pytest
import torch
from sampling import SPARSE, apply, condition, sample, widget_defaults

FAMILY = checkpoints.FAMILIES["sd3.5"]  # its blocks have no numbers; the first attends twice, the second once
HEADS, HEAD_DIM = 2, 64
TUNED, WIDGETS = {"#1": 0.2, "#2": 0.3, "#3": 0.4}, 0.5


@pytest.fixture(scope="module")
def sd3(comfy_nodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "sd3.5.safetensors"
    checkpoints.write(FAMILY, path)
    return checkpoints.load(FAMILY, path, None)


def module(comfy_nodes, name):
    return comfy_host.pack_module(comfy_nodes, f"nodes.{name}")


@pytest.fixture
def params(comfy_nodes, sd3):
    """Another share of blocks for each layer."""
    candidates, search, tuned = (module(comfy_nodes, f"tuned.{name}") for name in ("candidates", "search", "params"))

    def layer(topk):
        thresholds = module(comfy_nodes, "apply_node").SpargeParams(topk=torch.full((HEADS,), topk))
        setting = candidates.TunedSetting(thresholds, ("row-major",) * HEADS, "drop", "fp16")
        return tuned.TunedLayer(replace(search.LayerSearch.start(HEADS, HEADS), setting=setting), HEAD_DIM)

    layers = {name: layer(topk) for name, topk in TUNED.items()}
    return tuned.TunedParams(tuned.Architecture.of(sd3), search.Bounds(), MappingProxyType(layers))


@pytest.fixture
def shares(comfy_nodes, monkeypatch):
    """Share of blocks of each call that reaches the kernels, in order."""
    kernels, found = module(comfy_nodes, "run.kernel_calls"), []
    attention = kernels.sparge_attention

    def recorded(*args, params, **kwargs):
        found.append(round(float(torch.as_tensor(params.topk).flatten()[0]), 3))
        return attention(*args, params=params, **kwargs)

    monkeypatch.setattr(kernels, "sparge_attention", recorded)
    return found


def test_each_layer_has_its_own(comfy_nodes, sd3, params, shares):
    sample(apply(comfy_nodes, sd3, selection=SPARSE, params=params), FAMILY)
    assert shares == [*TUNED.values()] * 2


def test_two_nodes_count_a_call_once(comfy_nodes, sd3, params, shares):
    """What the outer node declines is the inner one's, under the name that it has."""
    inner = apply(comfy_nodes, sd3, selection=SPARSE, params=params)
    sample(apply(comfy_nodes, inner, min_tokens=100_000), FAMILY)
    assert shares == [*TUNED.values()] * 2
    shares.clear()
    outer = {name: layer for name, layer in params.layers.items() if name != "#2"}
    dense = replace(params.layers["#2"], search=replace(params.layers["#2"].search, setting=None))
    outer = replace(params, layers=MappingProxyType(outer | {"#2": dense}))  # hands on the second layer
    sample(apply(comfy_nodes, inner, selection=SPARSE, params=outer), FAMILY)
    assert shares == [*TUNED.values()] * 2


def skip_layers(model, kind):
    """The first of the two blocks is left out in evaluations of their own, or in those of the negative prompt."""
    from comfy_extras.nodes_sd3 import SkipLayerGuidanceSD3
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple

    window = {"start_percent": 0.0, "end_percent": 1.0}
    if kind == "simple":
        node, inputs = SkipLayerGuidanceDiTSimple, {"double_layers": "0", "single_layers": ""}
    elif kind == "dit":
        node, inputs = SkipLayerGuidanceDiT, {"double_layers": "0", "single_layers": "", "scale": 3.0}
    else:
        node, inputs = SkipLayerGuidanceSD3, {"layers": "0", "scale": 3.0}
    return node.execute(model=model, **inputs, **window).result[0]


@pytest.mark.parametrize("kind", ("sd3", "dit", "simple"))
@pytest.mark.parametrize("first", (False, True))
def test_skip_layer_guidance(comfy_nodes, sd3, params, shares, caplog, kind, first):
    """The one layer that is left is not taken for the first."""
    def patch(model):
        return apply(comfy_nodes, model, selection=SPARSE, params=params)

    model = patch(skip_layers(sd3, kind)) if first else skip_layers(patch(sd3), kind)
    with caplog.at_level("INFO"):
        sample(model, FAMILY, steps=3, cfg=4.0)
    assert shares == [*TUNED.values(), WIDGETS] * 3
    assert sum("may leave layers out" in line for line in caplog.messages) == 1


def test_search_beside_skip_layer_guidance(comfy_nodes, sd3):
    """Layers are searched in whole evaluations alone: none sees another's calls."""
    tuner = comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnTune"]
    values = {**widget_defaults(tuner), "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
              "sampled_steps": 2, "start_percent": 0.0, "min_tokens": checkpoints.MIN_TOKENS, "evaluate": False}
    found, _, _ = tuner.execute(model=skip_layers(sd3, "sd3"), positive=condition(FAMILY),
                                negative=condition(FAMILY, seed=2),
                                latent_image={"samples": torch.zeros(FAMILY.latent)}, **values).result
    assert {name: layer.search.calls for name, layer in found.layers.items()} == dict.fromkeys(TUNED, 2)


@pytest.mark.parametrize("mask, name", ((torch.zeros(2, 1, 1, 128), "key_bias"),
                                        (torch.ones(1, 128, dtype=torch.bool), "key_padding_mask")))
def test_search_takes_the_mask_of_the_call(comfy_nodes, sd3, params, monkeypatch, mask, name):
    measure, seen = module(comfy_nodes, "call.measure"), []

    def recorded(q, k, v, **kwargs):
        seen.append(kwargs)
        return torch.ones_like(q), SimpleNamespace(kept=torch.ones(2, HEADS))

    monkeypatch.setattr(measure, "sparge_attention", recorded)
    q = torch.randn(2, 128, HEADS * HEAD_DIM)
    call = module(comfy_nodes, "call.arguments").AttentionCall.parse((q, q, q, HEADS, mask), {"scale": 0.3})
    measure.CallMeasure(call, "unknown", q)(params.layers["#1"].search.setting)
    [given] = seen
    assert given[name].shape == (2, 128) and given["scale"] == 0.3 and given["impl"] == "reference"

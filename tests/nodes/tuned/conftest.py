from types import MappingProxyType

import pytest
import torch

from comfyui_spargeattn.nodes.tuned import params_file
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch, Measured
from comfyui_spargeattn.tests.nodes.tuned.planted import learnt

HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def params():
    search = LayerSearch.start(HEADS, KV_HEADS, Bounds(0.05, 0.06)).learn(learnt).evaluate(learnt)
    dense = LayerSearch.start(HEADS, KV_HEADS, Bounds(0.05, 0.06)).learn(
        lambda setting: Measured(torch.ones(HEADS), torch.ones(HEADS)))
    layers = {"double:0": TunedLayer(search, 128, ("1536: 4×16×24", "512")), "#2": TunedLayer(dense, 64)}
    return TunedParams(Architecture("WanModel", {"dim": 256, "patch_size": [1, 2, 2], "eps": 1e-6, "x": None}),
                       Bounds(0.05, 0.06), MappingProxyType(layers), MappingProxyType({"torch": "2"}))


@pytest.fixture
def saved(params, tmp_path):
    return params_file.save(params, tmp_path, "file")

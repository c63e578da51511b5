"""What travels between the nodes as SPARGE_PARAMS."""
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams, is_plain
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch, Measured


@pytest.fixture(scope="module")
def params():
    """A sparse layer of two heads, and a dense one that was further from dense attention."""
    start = LayerSearch.start(2, 2, Bounds(0.05, 0.05))
    sparse = start.learn(lambda setting: Measured(torch.tensor([0.01, 0.03]), setting.params.amount.clamp(min=0.2)))
    sparse = replace(sparse.evaluate(lambda setting: Measured(torch.tensor([0.02, 0.06]), setting.params.amount)))
    dense = replace(start, calls=1, error=torch.full((2,), 0.9), unseen=torch.full((2,), 0.9))
    layers = {"double:0": TunedLayer(sparse, 64), "double:1": TunedLayer(dense, 64)}
    return TunedParams(Architecture("Model", {}), Bounds(0.05, 0.05), MappingProxyType(layers))


def test_errors_are_those_of_the_heads_of_sparse_layers(params):
    assert params.error == pytest.approx((0.02, 0.03))
    assert params.unseen_error == pytest.approx((0.04, 0.06))


def test_sparsity_is_that_of_all_heads(params):
    assert params.sparsity == pytest.approx(0.4)
    assert "1 of 2 layers sparse, mean sparsity 40.0%" in str(params)


def test_sparsity_between_refreshes_is_called_so(params):
    assert "mean sparsity 40.0% between 3 refreshes, L1" in str(replace(params, refreshes=3))


def test_without_an_evaluation_there_is_no_error_of_it(params):
    layers = {name: replace(layer, search=replace(layer.search, unseen_calls=0))
              for name, layer in params.layers.items()}
    assert replace(params, layers=layers).unseen_error is None


def test_values_of_an_architecture_are_plain_ones():
    assert is_plain([1, (2.0, ["a", [None]])]) and is_plain(True)
    assert not any(map(is_plain, ({}, [{}], object(), [[[[[1]]]]], torch.zeros(1))))

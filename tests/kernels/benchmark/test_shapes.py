"""Shapes and the inputs that are made of them."""
import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.kernels.benchmark.shapes import SHAPES, Shape, inputs
from comfyui_spargeattn.tests.assertions import relative_l1

CPU = torch.device("cpu")


def test_within_what_is_free():
    shape = Shape("x", 40, 128, 1000, batch=2)
    assert shape.within(shape.bytes / 0.85) == shape
    half = shape.within(shape.bytes / 2)
    assert (half.batch, half.heads) == (1, 36)
    fewer = shape.within(shape.bytes / 4)
    assert (fewer.batch, fewer.heads) == (1, 18)
    assert shape.within(0).heads == 1
    for model in SHAPES.values():
        assert model.within(8e9).bytes <= 8e9 and model.within(1e12) == model
        assert model.for_a_cpu().bytes < 1 << 23


@pytest.mark.parametrize("wrong", (dict(heads=0), dict(head_dim=257), dict(tokens=0), dict(batch=65)), ids=str)
def test_a_shape_that_can_not_be(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name} must be in 1 …"):
        Shape("x", **{"heads": 1, "head_dim": 64, "tokens": 64, **wrong})


def test_inputs_are_local_and_the_same_each_time():
    shape = Shape("x", 2, 64, 1500)
    q, k, v = inputs(shape, CPU, torch.float32)
    assert all(torch.equal(x, again) for x, again in zip((q, k, v), inputs(shape, CPU, torch.float32)))
    exact = dense_attention(q, k, v)
    out = sparge_attention(q, k, v, params=SpargeParams(topk=0.3, similarity_threshold=-1.0), impl="reference")
    assert relative_l1(out, exact) < 0.1  # white noise comes to about 0.9

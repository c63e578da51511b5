"""Heads that change places by their costs: the rule, and two processes by the libraries that move the tensors."""
import itertools

import pytest
import torch

from comfyui_spargeattn.kernels.integrations.head_balance import HeadBalance, _Layer, busiest, spread
from comfyui_spargeattn.tests.kernels.integrations.libraries import needs, two_devices
from comfyui_spargeattn.tests.kernels.integrations.pair import found_by_two


def over_mean(costs, order, devices):
    """The busiest device's cost over the mean of all devices."""
    return busiest(costs, order, devices) * devices / sum(costs)


@pytest.mark.parametrize("devices", (2, 4))
def test_costs_that_fall_from_head_to_head(devices):
    costs = [1 - 0.07 * i for i in range(12)]
    assert over_mean(costs, range(12), devices) > 1.3
    assert over_mean(costs, spread(costs, devices), devices) < 1.1


@pytest.mark.parametrize("heads, devices", ((6, 2), (6, 3), (8, 2), (8, 4)))
def test_near_the_best_of_all_orders(heads, devices):
    generator = torch.Generator().manual_seed(heads * devices)
    for _ in range(20):
        costs = torch.rand(heads, generator=generator).tolist()
        order = spread(costs, devices)
        assert sorted(order) == list(range(heads))
        best = min(busiest(costs, x, devices) for x in itertools.permutations(range(heads)) if x[0] == 0) \
            if heads < 8 else max(sum(costs) / devices, max(costs))
        assert busiest(costs, order, devices) <= 4 / 3 * best


class Arrived:
    """Costs that are there."""

    def __init__(self, costs):
        self.costs = costs

    def read(self):
        return self.costs


@pytest.mark.parametrize("costs, moves", (([1, 1, 1, 1], False), ([1.02, 1, 1, 1], False), ([2, 2, 1, 1], True)))
def test_heads_move_where_it_is_worth_it(costs, moves):
    layer = _Layer()
    layer.arrange(4, 2)
    layer.gathering = Arrived(costs)
    layer.arrange(4, 2)
    assert (layer.order != (0, 1, 2, 3)) is moves
    for dtype, dim in ((torch.bfloat16, 8), (torch.float16, 3), (torch.float32, 1)):
        x = torch.arange(2 * 5 * 8 * dim).view(2, 5, 8, dim).to(dtype)
        moved = layer.move(x, 2, back=False)
        assert torch.equal(layer.move(moved, 2, back=True), x) and torch.equal(moved, x) is not moves
        if moves:  # query heads go with their head of K
            assert torch.equal(moved, x[:, :, [2 * head + i for head in layer.order for i in range(2)]])
            assert torch.equal(layer.move(x.transpose(1, 2), 1, back=False), moved.transpose(1, 2))


def test_another_number_of_heads_starts_anew():
    layer = _Layer()
    layer.arrange(4, 2)
    layer.gathering = Arrived([2, 2, 1, 1])
    layer.arrange(4, 2)
    layer.gathering = Arrived([1, 1, 2, 2])
    layer.arrange(6, 2)
    assert layer.order == tuple(range(6)) and layer.gathering is None


@pytest.mark.parametrize("layers", (0, -1, 1.5))
def test_layers_are_checked(layers):
    with pytest.raises(ValueError, match="layers must be an integer ≥ 1; got"):
        HeadBalance(layers)


@two_devices
@pytest.mark.parametrize("kind", ("yunchang", "registered", "xfuser", "diffusers"))
def test_two_processes(kind, tmp_path):
    """From the second step on both have about the same work, in both layers, and the result is as before."""
    if kind == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    else:
        needs("xfuser" if kind == "xfuser" else "yunchang")
    both = found_by_two("two_balanced", kind, tmp_path)
    assert len(both) == 2
    for found in both:
        assert found["counts"]["sparse"] == len(found["calls"]) * (1 if kind in ("registered", "diffusers") else 2)
        assert all(call["same"] for call in found["calls"])
    imbalance = [max(a["kept"], b["kept"]) / ((a["kept"] + b["kept"]) / 2) for a, b in zip(*(x["calls"] for x in both))]
    assert min(imbalance[:2]) > 1.3 and max(imbalance[2:]) < 1.1, imbalance

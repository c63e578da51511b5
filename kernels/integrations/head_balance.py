"""Heads spread over the devices of Ulysses by what they cost the step before.

Under Ulysses, device r of P computes heads r·H/P … of a call, and all wait for the slowest. With thresholds that select
by content, heads keep different numbers of blocks. Here the heads change places before they are sent to the devices, so
that each device gets as many heads as before and about the same work; afterwards they go back. The result is the same.

The costs of a call are gathered after it, without waiting for them, and used when its layer is called again: the next
step of a run. All devices then have the same costs and come to the same places.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Heads stay where they are unless the busiest device gets this much less to do: a move copies q, k, v and the output.
_GAIN = 0.03


def spread(costs: Sequence[float], devices: int) -> tuple[int, ...]:
    """The order of heads in which each of `devices` gets the same number of them and about the same cost.

    costs: one a head; their number is a multiple of `devices`. Greedy: the costliest head that is left goes to the
    device with the least cost that has room (Graham's longest processing time, with a limit of heads a device).
    """
    room = len(costs) // devices
    given: list[list[int]] = [[] for _ in range(devices)]
    total = [0.0] * devices
    for head in sorted(range(len(costs)), key=lambda head: (-costs[head], head)):
        device = min((d for d in range(devices) if len(given[d]) < room), key=lambda d: (total[d], d))
        given[device].append(head)
        total[device] += costs[head]
    return tuple(head for heads in given for head in sorted(heads))


def busiest(costs: Sequence[float], order: Sequence[int], devices: int) -> float:
    """The cost of the device that has most, when heads stand in this order."""
    room = len(order) // devices
    return max(sum(costs[head] for head in order[d * room:(d + 1) * room]) for d in range(devices))


class _Gathering:
    """The costs of all heads, on their way to this device's host."""

    def __init__(self, mine: Tensor, order: Sequence[int], group: dist.ProcessGroup, side: torch.cuda.Stream | None):
        self.order = order
        costs = mine.new_empty(len(order))
        work = dist.all_gather(list(costs.split(len(mine))), mine, group=group, async_op=side is not None)
        self.arrived = None
        if side is None:  # on a CPU nothing is queued that could wait for it
            self.costs = costs
            return
        with torch.cuda.stream(side):  # which alone waits for the others
            work.wait()
            self.costs = torch.empty(costs.shape, dtype=costs.dtype, device="cpu", pin_memory=True)
            self.costs.copy_(costs, non_blocking=True)
            for x in (mine, costs):  # a device that got other costs would take other heads
                x.record_stream(side)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        """The cost of each head."""
        if self.arrived is not None:
            self.arrived.synchronize()  # it was recorded a step of the run ago
        costs = [0.0] * len(self.order)
        for head, cost in zip(self.order, self.costs.tolist()):
            costs[head] = cost
        return costs


class _Layer:
    """Where the heads of a layer stand, and what is known of their costs."""

    def __init__(self):
        self.order: tuple[int, ...] = ()
        self.gathering: _Gathering | None = None
        self.moves: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def arrange(self, heads: int, devices: int) -> None:
        """Take the places that fit the costs of the call before, where they are worth a move."""
        gathering, self.gathering = self.gathering, None
        if len(self.order) != heads:
            self.order, self.moves = tuple(range(heads)), {}
        elif gathering is not None:
            costs = gathering.read()
            better = spread(costs, devices)
            if busiest(costs, better, devices) < (1 - _GAIN) * busiest(costs, self.order, devices):
                self.order, self.moves = better, {}

    def move(self, x: Tensor, dim: int, back: bool) -> Tensor:
        """The heads of x in their places, or back from there. Query heads that share a head of K move together."""
        if self.order == tuple(range(len(self.order))):
            return x
        heads = x.shape[dim], x.device
        if heads not in self.moves:
            there = torch.arange(heads[0]).view(len(self.order), -1)[list(self.order)].flatten()
            there, back_again = torch.stack((there, there.argsort())).to(x.device, non_blocking=True)
            self.moves[heads] = there, back_again
        # Eight bytes at a time, because such a copy spends more on its indices than on the numbers.
        wide = x.is_contiguous() and x.shape[-1] * x.element_size() % 8 == 0 and dim % x.ndim != x.ndim - 1
        moved = (x.view(torch.int64) if wide else x).index_select(dim, self.moves[heads][back])
        return moved.view(x.dtype)


@dataclass(frozen=True)
class Places:
    """Where the heads of one call stand: `there` before they are sent to the devices, `back` when they have returned,
    and `gather` for the next call of the layer; all three on every device."""

    layer: _Layer
    kv_heads: int
    group: dist.ProcessGroup
    side: torch.cuda.Stream | None

    def there(self, x: Tensor, dim: int = 2) -> Tensor:
        """x with its heads, along `dim`, in their places."""
        return self.layer.move(x, dim, back=False)

    def back(self, x: Tensor, dim: int = 2) -> Tensor:
        """The inverse of `there`."""
        return self.layer.move(x, dim, back=True)

    def gather(self, kept: Tensor | None, device: torch.device) -> None:
        """Tell the other devices what this one's heads cost, without waiting for them.

        kept: floating (query heads of this device,), the share of the blocks that each kept; None for all of them.
        """
        mine = self.kv_heads // dist.get_world_size(self.group)
        costs = torch.ones(mine, device=device) if kept is None else kept.float().view(mine, -1).mean(1)
        self.layer.gathering = _Gathering(costs, self.layer.order, self.group, self.side)


class HeadBalance:
    """The places of the heads in the attention calls of a model.

    layers: calls of one evaluation of the model: the n-th call of an evaluation and the n-th one of the next are taken
        for the same layer's. A wrong number costs balance, never correctness.

    Raises ValueError for layers that are not an integer ≥ 1.
    """

    def __init__(self, layers: int = 1):
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"layers must be an integer ≥ 1; got {layers!r}")
        self._layers = [_Layer() for _ in range(layers)]
        self._calls = 0
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def orders(self) -> list[tuple[int, ...]]:
        """The order of the heads of K in the latest call of each layer, () before the first."""
        return [layer.order for layer in self._layers]

    def places(self, key: Tensor, group: dist.ProcessGroup) -> Places | None:
        """Where the heads of the next call stand; None where they can't be shared out equally, and in a graph.

        key: (B, tokens of this device, heads of K on all devices of the `group`, D).
        """
        devices, kv_heads = dist.get_world_size(group), key.shape[2]
        if devices < 2 or kv_heads % devices or torch.compiler.is_compiling():
            return None
        layer = self._layers[self._calls % len(self._layers)]
        self._calls += 1
        layer.arrange(kv_heads, devices)
        if key.is_cuda and key.device not in self._sides:
            self._sides[key.device] = torch.cuda.Stream(key.device)
        return Places(layer, kv_heads, group, self._sides.get(key.device))

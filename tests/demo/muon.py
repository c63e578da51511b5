"""Muon: momentum with orthogonalised updates, for the weight matrices inside a transformer's blocks."""

from collections import defaultdict

import torch
from torch import Tensor


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate U Vᵀ of each matrix of g (K, M, N) by a quintic Newton-Schulz iteration."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are updated together; steps are scaled to the size of Adam's (RMS 0.2 lr).

    ``lr`` is a 0-d tensor on the parameters' device, so that a CUDA graph reads its current value.
    """

    def __init__(self, params, lr: Tensor, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                gradient = torch.stack([p.grad for p in params])
                state = self.state[params[0]]
                if not state:
                    state["average"] = torch.zeros_like(gradient)
                average = state["average"]
                average.lerp_(gradient, 1 - group["momentum"])
                blend = gradient.lerp(average, group["momentum"])
                if blend.is_cuda:
                    blend = blend.bfloat16()
                update = orthogonalise(blend).float() * (group["lr"] * 0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(params, list(update.unbind()))

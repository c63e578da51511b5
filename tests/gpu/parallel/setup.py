"""Where and at which size the benchmark of two GPUs runs, what it computes, and how it times it."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from comfyui_spargeattn.kernels import SpargeParams

ALL = SpargeParams(topk=1.0)
ATTENTIONS = {"dense": None, "every block": ALL} | {f"topk {share}": SpargeParams(topk=share) for share in (0.5, 0.25)}
# Not by a ring: torch's attention has no log-sum-exp, or one in 16 bits, and a ring is compared with the other.
BY_HEADS_ALONE = "dense", "topk 0.25"


@dataclass(frozen=True)
class Setup:
    """Where a run takes place, and at which size."""

    rank: int
    device: torch.device
    grid: tuple[int, int, int]  # tokens
    heads: int
    dim: int
    layers: int
    ffn: int
    repeats: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def settings(self) -> dict:
        """Of the integrations: short calls go sparse too, and a CPU has the reference alone."""
        return dict(min_tokens=256, impl="triton" if self.cuda else "reference")

    def milliseconds(self, run: Callable) -> float:
        """Median time of a call after two to warm up: the slower process's, each begun together."""
        times = []
        for i in range(self.repeats + 2):
            dist.all_reduce(torch.zeros(1, device=self.device))
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host launches
                start.record()
                run()
                end.record()
                end.synchronize()
                spent = start.elapsed_time(end)
            else:
                start = time.perf_counter()
                run()
                spent = (time.perf_counter() - start) * 1e3
            if i > 1:
                times.append(spent)
        slowest = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return round(slowest.item(), 3)

    def of_both(self, value: float) -> float:
        """The larger of the two processes' values."""
        larger = torch.tensor(value, device=self.device)
        dist.all_reduce(larger, dist.ReduceOp.MAX)
        return larger.item()

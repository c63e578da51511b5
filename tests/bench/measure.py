"""Times, errors and the correctness gate that every mode of the benchmark shares."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_spargeattn.kernels import BlockMap
from tests.assertions import relative_l1

# Relative L1 that quantisation alone may cost, against exact arithmetic over the same blocks.
GATES = {"exact": 0.01, "fp16": 0.025, "int8": 0.03, "fp8": 0.06}
_SLEEP = 2_000_000  # cycles, about a millisecond: the host has launched the call before the device reaches it


def device_ms(run: Callable, repeats: int = 10) -> float:
    """Median device time of a call. The device sleeps while the host launches, so host latency does not count."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_us(run: Callable, calls: int = 100) -> float:
    """Host time of a call that does not wait for the device. Use it for short calls, which do not fill the queue."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def error(out: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative L1 and L2, and cosine similarity."""
    return dict(L1=relative_l1(out, exact), L2=((out - exact).float().norm() / exact.float().norm()).item(),
                cos=F.cosine_similarity(out.float().flatten(), exact.float().flatten(), dim=0).item())


def exact_sample(q: Tensor, k: Tensor, v: Tensor, chosen: BlockMap | None, start: int, rows: int,
                 skipped: str = "drop") -> Tensor:
    """float32 attention of query rows [start, start + rows), over the chosen blocks if `chosen` is given; with
    `skipped` "pooled", the tokens of the others all have the mean score of their block."""
    scores = q[:, :, start:start + rows].float() @ k.float().mT * q.shape[-1] ** -0.5
    if chosen is not None:
        i, size, k_tokens = start // chosen.block.q, chosen.block.k, k.shape[2]
        listed = BlockMap(chosen.indices[:, :, i:i + 1], chosen.counts[:, :, i:i + 1], chosen.block)
        mask = listed.mask().repeat_interleave(size, -1)[..., :k_tokens]
        if skipped == "pooled":
            sums = F.pad(scores, (0, -k_tokens % size)).unflatten(-1, (-1, size)).sum(-1)
            tokens = (k_tokens - torch.arange(0, k_tokens, size, device=k.device)).clamp(max=size)
            scores = scores.where(mask, (sums / tokens).repeat_interleave(size, -1)[..., :k_tokens])
        else:
            scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num_(0.0) @ v.float()


def gate_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: BlockMap | None, skipped: str = "drop") -> float:
    """The worst L1 of three blocks of queries of all heads, against exact arithmetic over the same blocks."""
    rows = 64 if chosen is None else chosen.block.q
    worst = 0.0
    for start in (0, q.shape[2] // 2 // rows * rows, (q.shape[2] - 1) // rows * rows):
        sample = out[:, :, start:start + rows]
        worst = max(worst, relative_l1(sample, exact_sample(q, k, v, chosen, start, sample.shape[2], skipped)))
    return worst


def card() -> dict[str, str]:
    """The card and the versions on which a report was measured."""
    import triton
    return dict(card=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)

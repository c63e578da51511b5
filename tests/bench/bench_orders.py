"""Measure what the order of visual tokens is worth: `python -m tests.bench.bench_orders --out orders.json`.

For every order of a (T, H, W) grid this measures how similar the tokens of a block are, how many blocks attention needs
for a given error, with the self-similarity judge off and on, and the time of a call. The inputs are structured random
ones and the self-attention calls of the demo's trained model; for the model it also measures the PSNR of a whole clip.
"""
from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.hilbert import CURVES, sequence_order
from comfyui_spargeattn.kernels import SpargeParams, block_shape, sparge_attention
from comfyui_spargeattn.kernels.reference import compress
from comfyui_spargeattn.nodes.demo.words import prompt
from tests.assertions import relative_l1
from tests.bench.measure import device_ms
from tests.cases import video_qkv
from tests.demo import compare
from tests.demo.model import WEIGHTS, load, scaled_dot_product

GRID = (21, 30, 52)
TARGET_L1 = 0.05
JUDGES = (-1.0, 0.3, 0.5)  # similarity_threshold; -1 switches the judge off
CLIPS = ((0.95, -1.0), (0.95, 0.3), (0.98, 0.5))  # (cdf_threshold, similarity_threshold) of whole clips
WORDS = ("star red plain right", "blue checker left", "ring yellow plain left")
Call = tuple[Tensor, Tensor, Tensor]


def orders(device: str, grid: tuple[int, int, int] = GRID, before: int = 0) -> dict[str, Tensor | None]:
    """Name → order of a grid behind `before` other tokens; None is the model's own, row-major."""
    tokens = torch.arange(before + math.prod(grid), dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    found = {"random": torch.randperm(len(tokens), generator=generator).int().to(device), "row-major": None}
    # Frame by frame, each column from top to bottom.
    found["column-major"] = torch.cat([tokens[before:].view(grid).mT.flatten(), tokens[:before]])
    return found | {curve: sequence_order(grid, before=before, curve=curve, device=device)
                    for curve in CURVES if curve != "row-major"}


def demo_calls(model, words: Tensor, clip: Tensor, level: float = 0.5) -> list[Call]:
    """q, k, v of every self-attention of one step, on a clip (16, T, H, W) at a noise level."""
    calls: list[Call] = []

    def keep(q, k, v):
        calls.append((q.clone(), k.clone(), v.clone()))
        return scaled_dot_product(q, k, v)

    compare.step_at(model, keep, words, clip, level)
    return calls


def similarity(calls: list[Call], order: Tensor | None) -> tuple[float, float]:
    """Mean self-similarity of the blocks of Q and K."""
    means, shape = [], block_shape(calls[0][0])
    for which, block in enumerate((shape.q, shape.k)):
        values = []
        for call in calls:
            x = call[which].float() if order is None else call[which][:, :, order.long()].float()
            flags = torch.zeros(x.shape[1:3], dtype=torch.bool, device=x.device)
            values.append(compress(x, block, flags=flags, centre=which == 1).similarity.mean())
        means.append(torch.stack(values).mean().item())
    return means[0], means[1]


def largest_sparsity(at: Callable[[float], tuple[float, float]], halvings: int) -> float:
    """Bisect the cdf_threshold for the largest sparsity below the target L1; `at(threshold)` is (L1, sparsity)."""
    low, high, best = 0.3, 1.0, 0.0
    for _ in range(halvings):
        middle = (low + high) / 2
        l1, sparsity = at(middle)
        if l1 <= TARGET_L1:
            high, best = middle, sparsity
        else:
            low = middle
    return best


def sparsity_at_error(calls: list[Call], dense: list[Tensor], order: Tensor | None, theta: float) -> float:
    """Largest mean sparsity, over one cdf_threshold for all calls, whose mean L1 is below the target."""
    def at(tau: float) -> tuple[float, float]:
        params = SpargeParams(cdf_threshold=tau, similarity_threshold=theta)
        results = [sparge_attention(*call, params=params, order=order, return_stats=True) for call in calls]
        l1 = sum(relative_l1(out, exact) for (out, _), exact in zip(results, dense)) / len(calls)
        return l1, sum(stats.sparsity.mean().item() for _, stats in results) / len(calls)

    return largest_sparsity(at, 9)


def measure(name: str, calls: list[Call], device: str) -> list[dict]:
    """One row for each order."""
    dense, rows = [scaled_dot_product(*call) for call in calls], []
    topk = SpargeParams(topk=0.3, similarity_threshold=-1.0)
    for label, order in orders(device).items():
        row = dict(inputs=name, order=label)
        row["similarity_q"], row["similarity_k"] = similarity(calls, order)
        for theta in JUDGES:
            row[f"sparsity θ={theta:g}"] = sparsity_at_error(calls, dense, order, theta)
        row["ms"] = device_ms(partial(sparge_attention, *calls[0], params=topk, order=order), 30)
        rows.append(row)
    return rows


def clips(model, words: Tensor, steps: int = 20) -> dict[str, dict]:
    """Order → PSNR in dB against dense, sparsity, and attention time of a clip at each of `CLIPS`."""
    first = compare.dense_share(steps, 0.2)
    dense = compare.generate(model, "dense", None, words, GRID, steps, 0, first)
    found, attention = {}, compare.sparge_attention
    for label, order in orders("cuda").items():
        compare.sparge_attention, row = partial(attention, order=order), {}
        for cdf, theta in CLIPS:
            params = SpargeParams(cdf_threshold=cdf, similarity_threshold=theta)
            run = compare.generate(model, label, params, words, GRID, steps, 0, first)
            row[f"clip {cdf:g}, θ={theta:g}"] = dict(
                psnr_db=compare.psnr(run.latent, dense.latent), sparsity=1 - run.kept, seconds=run.attention_seconds)
        found[label] = row
    compare.sparge_attention = attention
    return found


def _cell(value) -> str:
    if isinstance(value, dict):
        return "{psnr_db:.1f} dB, {sparsity:.1%}, {seconds:.3f} s".format(**value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file for the rows")
    args = parser.parse_args()
    device, words = "cuda", prompt(*WORDS)
    model = load(WEIGHTS, device, torch.bfloat16)
    clip = compare.generate(model, "dense", None, words, GRID, 20, 0, 0).latent
    rows = measure("structured", [video_qkv(GRID, 12, 128)], device)
    whole = clips(model, words)
    rows += [row | whole[row["order"]] for row in measure("demo model", demo_calls(model, words, clip), device)]
    names = list(rows[-1])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |")
    if args.out:
        Path(args.out).write_text(json.dumps(dict(card=torch.cuda.get_device_name(), rows=rows), indent=1))


if __name__ == "__main__":
    main()

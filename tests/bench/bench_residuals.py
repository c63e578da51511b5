"""Measure what refreshes are worth over whole runs: `python -m tests.bench.bench_residuals --out residuals.json`.

The demo's trained model makes clips, three seeds each, with dense attention and with SpargeAttn at several settings,
with and without refreshes. For each setting: PSNR against the dense clip of the same seed (median and worst), the share
of block pairs computed over the whole run with dense evaluations counted as 1, and on a GPU the time of all attention
of a run as a share of dense attention's. --grid, --steps, --seeds and --only make it fit a CPU.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import Residual, SpargeParams, attention_residual, sparge_attention
from comfyui_spargeattn.nodes.demo.words import prompt
from comfyui_spargeattn.nodes.run.refresh_schedule import refresh_steps
from tests.demo.compare import Attention, dense_share, psnr
from tests.demo.model import WEIGHTS, load, scaled_dot_product
from tests.demo.sampling import sample, shifted

WORDS = ("star red plain right", "blue checker left", "ring yellow plain left")
START_PERCENT = 0.2
# (thresholds, refreshes); the judge is off, skipped blocks are pooled
SETTINGS = [(dict(cdf_threshold=tau), 0) for tau in (0.9, 0.95, 0.98, 0.99)] + [
    (amount, refreshes) for amount in (dict(topk=0.1), dict(cdf_threshold=0.8), dict(cdf_threshold=0.9))
    for refreshes in (2, 3, 5)]


@dataclass
class Refreshed(Attention):
    """Attention that goes sparse after `dense_steps` and adds the residual of the last refresh.

    layers: how many calls the model makes a step.
    computed: share of block pairs of each call, on the device.
    """

    refreshes: frozenset[int] = frozenset()
    layers: int = 1
    computed: list[Tensor] = field(default_factory=list)
    residuals: dict[int, Residual] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer, how = len(self.computed) % self.layers, dict(params=self.params, skipped="pooled")
        start = self._now(q)
        if self.params is None or self.step < self.dense_steps or self.step in self.refreshes:
            out, kept = scaled_dot_product(q, k, v), torch.ones((), device=q.device)
            if self.step in self.refreshes:
                self.residuals[layer] = attention_residual(q, k, v, out, **how)
        else:
            out, stats = sparge_attention(q, k, v, residual=self.residuals.get(layer), return_stats=True, **how)
            kept = stats.kept.mean()
        self.spans.append((start, self._now(q)))
        self.computed.append(kept)
        return out


def clip(model, params: SpargeParams | None, refreshes: int, grid: tuple[int, int, int], steps: int,
         seed: int) -> tuple[Tensor, float, float]:
    """(latent, share computed, seconds of attention) of one run."""
    first = dense_share(steps, START_PERCENT)
    chosen: list[int] = []
    if refreshes:
        levels = [shifted(i / steps) for i in range(steps, -1, -1)]
        chosen = refresh_steps(levels, refreshes + 1, first - 1)
    attention = model.attention = Refreshed(params, first, refreshes=frozenset(chosen), layers=len(model.blocks))
    latent = sample(model, prompt(*WORDS)[None], (grid[0], 2 * grid[1], 2 * grid[2]), steps, seed,
                    before_step=attention.enter_step)[0].cpu()
    return latent, torch.stack(attention.computed).mean().item(), attention.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=(11, 12, 13))
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the settings to measure, from 0")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    model = load(WEIGHTS, "cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)
    chosen = [SETTINGS[i] for i in args.only] if args.only else SETTINGS

    def run(thresholds, refreshes, seed):
        params = None if thresholds is None else SpargeParams(**thresholds, similarity_threshold=-1.0)
        return clip(model, params, refreshes, args.grid, args.steps, seed)

    if gpu:  # compile outside the timed runs
        for setting in chosen:
            run(*setting, args.seeds[0])
        run(None, 0, args.seeds[0])
    dense = {seed: run(None, 0, seed) for seed in args.seeds}
    rows = []
    for thresholds, refreshes in chosen:
        runs = {seed: run(thresholds, refreshes, seed) for seed in args.seeds}
        decibels = [psnr(runs[seed][0], dense[seed][0]) for seed in args.seeds]
        rows.append(dict(**thresholds, refreshes=refreshes, psnr_median=statistics.median(decibels),
                         psnr_worst=min(decibels), computed=statistics.median(r[1] for r in runs.values()),
                         attention=statistics.median(runs[s][2] / dense[s][2] for s in args.seeds) if gpu else None))
        print(json.dumps(rows[-1]), flush=True)
    args.out.write_text(json.dumps(dict(
        device=torch.cuda.get_device_name() if gpu else "CPU reference", torch=torch.__version__, grid=args.grid,
        tokens=math.prod(args.grid), steps=args.steps, seeds=args.seeds, start_percent=START_PERCENT,
        date=time.strftime("%Y-%m-%d"), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()

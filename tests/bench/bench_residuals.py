"""Measure what refreshes are worth over whole runs: `python -m tests.bench.bench_residuals --out residuals.json`.

The demo's trained model makes a clip of each of its scenes, all in one batch, with dense attention and with SpargeAttn
at several settings, with and without refreshes. For each setting: PSNR of the clips against the dense ones of the same
noise (mean, median and worst), the share of block pairs computed over the whole run but for those that residuals are
made of, and on a GPU the time of all attention of a run as a share of dense attention's (PyTorch's). Dense evaluations
of a sparse run go through this package's kernel, with every block kept or nearly all. With --tuned it also searches the
thresholds of every layer and head, on one clip of another prompt and noise, for runs without and with refreshes.
--grid, --steps, --seeds and --only make it fit a CPU.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import Residual, SpargeParams, attention_residual, sparge_attention
from comfyui_spargeattn.nodes.call.token_layout import TokenLayout
from comfyui_spargeattn.nodes.demo.words import SCENES, prompt
from comfyui_spargeattn.nodes.run.refresh_schedule import leads, refresh_steps
from comfyui_spargeattn.nodes.tuned.candidates import TunedSetting
from tests.bench.tuned_layers import arguments, searching
from tests.demo.compare import Attention, dense_share, psnr
from tests.demo.model import WEIGHTS, load
from tests.demo.sampling import sample, shifted


class Setting(NamedTuple):
    """amount: the threshold of the sparse calls, None for dense attention in PyTorch.
    start: share of the schedule, by noise, that stays dense. refreshes: as the widget of that name.
    l1: of a search, whose thresholds take the place of `amount`.
    dense: cdf_threshold of the dense evaluations; below 1 they skip blocks too, and pool them."""

    amount: dict | None
    start: float = 0.2
    refreshes: int = 0
    skipped: str = "pooled"
    l1: float | None = None
    dense: float = 1.0


SETTINGS = (
    [Setting(dict(cdf_threshold=1.0), skipped="drop")]
    + [Setting(dict(cdf_threshold=tau), dense=dense) for dense in (1.0, 0.999)
       for tau in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)]
    + [Setting(dict(topk=share), refreshes=refreshes, dense=0.999) for refreshes in (3, 4, 6)
       for share in (0.05, 0.1, 0.2)]
    + [Setting(dict(topk=share), refreshes=4) for share in (0.1, 0.2)]
    + [Setting(dict(cdf_threshold=0.9), refreshes=refreshes, dense=0.999) for refreshes in (4, 6)]
    + [Setting(dict(topk=share), refreshes=refreshes, dense=0.999) for refreshes in (8, 12) for share in (0.05, 0.1)])
TUNED = [Setting(None, refreshes=refreshes, l1=l1, dense=0.999)
         for refreshes, l1 in ((0, 0.05), (4, 0.05), (0, 0.02), (4, 0.1))]
TUNED_ON, TUNED_SEED = ("circle white stripes right", "purple checker up"), 1


class Run(NamedTuple):
    """latents: of a clip of each scene. computed: share of block pairs. seconds: of all attention, on a GPU."""

    latents: Tensor
    computed: float
    seconds: float | None


@dataclass
class Refreshed(Attention):
    """Attention that goes sparse after `dense_steps` and adds the residual of the last refresh.

    refreshes: as of `refreshes_of`.
    last_step: of the run, after which no residual is used.
    layers: how many calls the model makes a step.
    tuned: the setting of each layer, in place of `params` and `skipped`.
    dense: as of `Setting`.
    layout: of the tokens.
    computed: share of block pairs of each call, on the device.
    """

    skipped: str = "pooled"
    refreshes: dict[int, float] = field(default_factory=dict)
    last_step: int = 0
    layers: int = 1
    tuned: list[TunedSetting | None] | None = None
    dense: float = 1.0
    layout: TokenLayout = TokenLayout((1, 1, 1))
    computed: list[Tensor] = field(default_factory=list)
    residuals: dict[int, Residual] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.params is None and self.tuned is None:
            return super().__call__(q, k, v)
        layer, kept = len(self.computed) % self.layers, torch.ones((), device=q.device)
        how: dict | None = dict(params=self.params, skipped=self.skipped)
        if self.tuned is not None:
            how = arguments(self.tuned[layer], self.layout, q)
        start = self._now(q)
        if how is None or self.step < self.dense_steps or self.step in self.refreshes:
            strict = SpargeParams(cdf_threshold=self.dense, similarity_threshold=-1.0)
            out, stats = sparge_attention(q, k, v, params=strict, skipped="pooled" if self.dense < 1 else "drop",
                                          return_stats=True)
            kept = stats.kept.mean()
            if how is not None and self.step in self.refreshes and self.step < self.last_step:
                lead = self.refreshes[self.step]
                earlier = self.residuals.get(layer) if lead else None
                self.residuals[layer] = attention_residual(q, k, v, out, earlier=earlier, lead=lead, **how)
        else:
            out, stats = sparge_attention(q, k, v, residual=self.residuals.get(layer), return_stats=True, **how)
            kept = stats.kept.mean()
        self.spans.append((start, self._now(q)))
        self.computed.append(kept)
        return out


def refreshes_of(setting: Setting, steps: int) -> dict[int, float]:
    """The steps that refresh, and how far beyond them residuals are extrapolated."""
    if not setting.refreshes:
        return {}
    noise = [shifted(i / steps) for i in range(steps, -1, -1)]
    first = dense_share(steps, setting.start)
    before = first > 0  # the last dense step refreshes as well
    chosen = refresh_steps(noise, setting.refreshes + before, first - before)
    return dict(zip(chosen, leads(noise, chosen)))


def search(model, setting: Setting, grid: tuple[int, int, int], steps: int) -> list[TunedSetting | None]:
    """The settings of the layers that a search finds."""
    began = time.perf_counter()
    found = model.attention = searching(model, grid, setting.l1, dense_share(steps, setting.start), steps,
                                        refreshes_of(setting, steps))
    sample(model, prompt(*TUNED_ON)[None], (grid[0], 2 * grid[1], 2 * grid[2]), steps, TUNED_SEED,
           before_step=found.enter_step)
    kept = statistics.fmean(1 - layer.sparsity.mean().item() for layer in found.layers)
    print(f"l1 {setting.l1:g}, {setting.refreshes} refreshes: searched in {time.perf_counter() - began:.0f} s, "
          f"{kept:.1%} of the blocks kept", flush=True)
    return [layer.setting for layer in found.layers]


def clips(model, setting: Setting, tuned: list[TunedSetting | None] | None, grid: tuple[int, int, int], steps: int,
          seed: int) -> Run:
    """One run of a setting, all scenes in a batch."""
    params = None if setting.amount is None else SpargeParams(**setting.amount, similarity_threshold=-1.0)
    attention = model.attention = Refreshed(
        params, dense_share(steps, setting.start), skipped=setting.skipped, refreshes=refreshes_of(setting, steps),
        last_step=steps - 1, layers=len(model.blocks), tuned=tuned, dense=setting.dense, layout=TokenLayout(grid))
    latents = sample(model, torch.stack([prompt(*words) for words in SCENES.values()]),
                     (grid[0], 2 * grid[1], 2 * grid[2]), steps, seed, before_step=attention.enter_step)
    computed = torch.stack(attention.computed).mean().item() if attention.computed else 1.0
    return Run(latents.cpu(), computed, attention.seconds() if latents.is_cuda else None)


def measured(setting: Setting, runs: dict[int, Run], dense: dict[int, Run], steps: int) -> dict:
    """A row of the results: `runs` of a setting against those of dense attention, by seed."""
    decibels = [psnr(a, b) for seed in runs for a, b in zip(runs[seed].latents, dense[seed].latents)]
    return dict(
        steps=steps, seeds=list(runs), amount=setting.amount, l1=setting.l1,
        dense_steps=list(range(dense_share(steps, setting.start))), refreshed=list(refreshes_of(setting, steps)),
        dense_cdf=setting.dense, skipped=None if setting.l1 else setting.skipped,
        psnr_mean=statistics.fmean(decibels), psnr_median=statistics.median(decibels), psnr_worst=min(decibels),
        psnr=decibels, computed=statistics.fmean(run.computed for run in runs.values()),
        attention=statistics.fmean(run.seconds / dense[seed].seconds for seed, run in runs.items())
        if all(run.seconds for run in runs.values()) else None)


def measurements(model, chosen: Sequence[Setting], grid: tuple[int, int, int], steps: int,
                 seeds: Sequence[int]) -> Iterator[dict]:
    """The rows of the settings, in so many steps."""
    tuned = {(s.l1, s.refreshes): search(model, s, grid, steps) for s in chosen if s.l1 is not None}

    def run(setting: Setting, seed: int) -> Run:
        return clips(model, setting, tuned.get((setting.l1, setting.refreshes)), grid, steps, seed)

    if torch.cuda.is_available():  # compile outside the timed runs: one of each kind of call
        kinds = {(*(s.amount or ()), s.skipped, s.refreshes > 0, s.dense < 1, s.l1): s
                 for s in (Setting(None), *chosen)}
        for setting in kinds.values():
            run(setting, seeds[0])
    dense = {seed: run(Setting(None), seed) for seed in seeds}
    for setting in chosen:
        yield measured(setting, {seed: run(setting, seed) for seed in seeds}, dense, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52))
    parser.add_argument("--steps", type=int, nargs="+", default=(20,))
    parser.add_argument("--seeds", type=int, nargs="+", default=(21,))
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to measure, from 0")
    parser.add_argument("--tuned", type=int, nargs="*", help="also tuned settings: all, or these numbers, from 0")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    model = load(WEIGHTS, "cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)
    args.grid = tuple(args.grid)
    chosen = SETTINGS if args.only is None else [SETTINGS[i] for i in args.only]
    if args.tuned is not None:
        chosen = chosen + [TUNED[i] for i in args.tuned or range(len(TUNED))]
    head = dict(
        mode="residuals", card=torch.cuda.get_device_name() if gpu else "CPU reference", torch=torch.__version__,
        triton=version("triton") if gpu else "-", grid=args.grid, tokens=math.prod(args.grid), scenes=list(SCENES),
        date=time.strftime("%Y-%m-%d"))
    rows = []
    for steps in args.steps:
        for row in measurements(model, chosen, args.grid, steps, args.seeds):
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(head | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()

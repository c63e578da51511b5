"""Run the demo's model dense and with SpargeAttn on the same seed, and measure what differs."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import SpargeParams, block_map, sparge_attention
from comfyui_spargeattn.nodes.demo.words import encode

from ..assertions import relative_l1
from .clips import preview
from .model import scaled_dot_product
from .sampling import sample, shifted


@dataclass
class Run:
    """One generated clip. ``kept`` is the share of block pairs that its sparse calls computed, 1 without such calls."""

    name: str
    latent: Tensor
    seconds: float
    attention_seconds: float | None
    kept: float = 1.0
    psnr: float = math.inf
    l1: float = 0.0


@dataclass
class Attention:
    """Self-attention for ``WanT2V.attention`` that goes sparse after ``dense_steps`` and keeps the time."""

    params: SpargeParams | None
    dense_steps: int = 0
    step: int = 0
    kept: list[Tensor] = field(default_factory=list)
    spans: list[tuple] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = self._now(q)
        if self.params is None or self.step < self.dense_steps:
            out = scaled_dot_product(q, k, v)
        else:
            out, stats = sparge_attention(q, k, v, params=self.params, return_stats=True)
            self.kept.append(stats.kept.mean())
        self.spans.append((start, self._now(q)))
        return out

    @staticmethod
    def _now(x: Tensor):
        if not x.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # no waiting between the calls
        event.record()
        return event

    def seconds(self) -> float:
        return sum(a.elapsed_time(b) / 1000 if hasattr(a, "elapsed_time") else b - a for a, b in self.spans)

    def enter_step(self, step: int) -> None:
        self.step = step


def generate(model, name: str, params: SpargeParams | None, prompt: Tensor, grid: tuple[int, int, int], steps: int,
             seed: int, dense_steps: int, after_step=None) -> Run:
    """Sample one clip of token grid (T, h, w); ``params`` None is dense attention.

    ``after_step(n)``, if given, is called when n steps have been taken, on a GPU when they have been launched.
    """
    attention = model.attention = Attention(params, dense_steps)
    latent_grid = (grid[0], 2 * grid[1], 2 * grid[2])
    start = time.perf_counter()
    latent = sample(model, prompt[None], latent_grid, steps, seed, before_step=attention.enter_step,
                    after_step=after_step)[0].cpu()
    seconds = time.perf_counter() - start
    kept = torch.stack(attention.kept).mean().item() if attention.kept else 1.0
    return Run(name, latent, seconds, attention.seconds(), kept)


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between the previews of two latents, peak 1."""
    error = (preview(a) - preview(b)).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


@torch.no_grad()
def step_at(model, attention, prompt: Tensor, clip: Tensor, level: float, seed: int = 0) -> None:
    """Evaluate the model once on a clip (16, T, H, W) at a noise level, with another self-attention."""
    weight = model.head.head.weight
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    x = clip.lerp(noise, level)[None].to(weight.device, weight.dtype)
    model.attention = attention
    model(x, torch.tensor([1000 * level], device=x.device), encode(prompt[None]).to(weight.device, weight.dtype))


def probe(model, prompt: Tensor, clip: Tensor, params: list[SpargeParams], level: float = 0.5, seed: int = 0):
    """Single attention calls inside one step of a dense run, on the clip (16, T, H, W) at a noise level.

    Returns the mean relative L1 error of each params, and the block maps of the last: bool (layers, heads, q_blocks,
    k_blocks).
    """
    errors, maps = [[] for _ in params], []

    def attention(q, k, v):
        dense = scaled_dot_product(q, k, v)
        for p, e in zip(params, errors):
            e.append(relative_l1(sparge_attention(q, k, v, params=p), dense))
        maps.append(block_map(q, k, params=params[-1]).mask()[0].cpu())
        return dense

    step_at(model, attention, prompt, clip, level, seed)
    return [sum(e) / len(e) for e in errors], torch.stack(maps)


def dense_share(steps: int, start_percent: float) -> int:
    """Number of first steps that ComfyUI's percent window (by sigma) leaves dense."""
    levels = [shifted(i / steps) for i in range(steps, 0, -1)]
    return sum(level > shifted(1 - start_percent) + 1e-6 for level in levels)

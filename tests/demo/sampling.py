"""Euler sampling of a flow model on ComfyUI's "simple" schedule, and pictures of the clips."""

import itertools

import torch
from PIL import Image
from torch import Tensor

from comfyui_spargeattn.nodes.demo.words import encode

from .clips import preview

SHIFT = 8.0  # ComfyUI's default for Wan 2.1


def shifted(u, shift: float = SHIFT):
    """Move noise levels u in 0..1 towards 1: larger clips need more steps at high noise."""
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def sample(model, prompts: Tensor, grid: tuple[int, int, int], steps: int = 20, seed: int = 0, cfg: float = 1.0,
           before_step=None, after_step=None) -> Tensor:
    """Latents (B, 16, T, H, W) in fp32 for prompts (B, 11).

    The CPU draws the noise, so that a seed gives the same clip on every device. ``before_step(i)`` and
    ``after_step(i + 1)``, if given, are called around step i.
    """
    weight = model.head.head.weight
    context = encode(prompts).to(weight.device, weight.dtype)
    noise = torch.randn(len(prompts), 16, *grid, generator=torch.Generator().manual_seed(seed))
    x = noise.to(weight.device)
    levels = shifted(torch.arange(steps, -1, -1) / steps).tolist()

    def velocity(context, level):
        t = torch.full((len(x),), level * 1000, device=x.device)
        return model(x.to(weight.dtype), t, context).float()

    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        if before_step is not None:
            before_step(i)
        v = velocity(context, level)
        if cfg != 1.0:
            empty = velocity(torch.zeros_like(context), level)
            v = empty + cfg * (v - empty)
        x = x + (following - level) * v
        if after_step is not None:
            after_step(i + 1)
    return x


def frames(latent: Tensor, scale: int = 4) -> list[Image.Image]:
    """Preview pictures of one latent (16, T, H, W), enlarged."""
    rgb = (preview(latent) * 255).round().byte().cpu().numpy()
    height, width = rgb.shape[1:3]
    return [Image.fromarray(f).resize((width * scale, height * scale), Image.Resampling.BICUBIC) for f in rgb]


def sheet(latents: Tensor, columns: int = 6, scale: int = 3) -> Image.Image:
    """Contact sheet of (B, 16, T, H, W): a row for each clip, columns spread over its time."""
    count = latents.shape[2]
    chosen = [round(i * (count - 1) / (columns - 1)) for i in range(columns)]
    rows = [frames(latent[:, chosen], scale) for latent in latents]
    width, height = rows[0][0].size
    page = Image.new("RGB", (columns * (width + 2), len(rows) * (height + 2)))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            page.paste(image, (c * (width + 2), r * (height + 2)))
    return page

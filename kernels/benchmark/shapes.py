"""Shapes of models' self-attention at usual sizes, and inputs of them."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Bytes a channel of a token: q, k, v and three outputs in 16 bits, quantised copies, and what a backend may need.
_BYTES = 24
_FREE_SHARE = 0.9  # of what is free that may be taken


@dataclass(frozen=True)
class Shape:
    """Self-attention of `batch` sequences of `tokens`, with `heads` of `head_dim` channels."""

    name: str
    heads: int
    head_dim: int
    tokens: int
    batch: int = 1

    def __post_init__(self):
        for name, most in (("heads", 512), ("head_dim", 256), ("tokens", 1 << 20), ("batch", 64)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be in 1 … {most}; got {value}")

    def __str__(self) -> str:
        batch = f"{self.batch} × " if self.batch > 1 else ""
        heads = f"{self.heads} head{'s' * (self.heads > 1)}"
        return f"{self.name}: {batch}{heads} × {self.tokens} tokens × {self.head_dim}"

    @property
    def bytes(self) -> int:
        """Memory that a benchmark of it takes."""
        return _BYTES * self.batch * self.heads * self.tokens * self.head_dim

    def within(self, free: float) -> Shape:
        """As much of it as fits into so many bytes: whole sequences first, then heads, at least one of each."""
        most = int(free * _FREE_SHARE / (_BYTES * self.tokens * self.head_dim))
        if most >= self.batch * self.heads:
            return self
        batch = max(1, most // self.heads)
        return replace(self, batch=batch, heads=self.heads if batch > 1 else max(1, min(self.heads, most)))

    def for_a_cpu(self) -> Shape:
        """As much of it as a CPU computes in a moment."""
        return replace(self, batch=1, heads=min(self.heads, 2), tokens=min(self.tokens, 512))


# Text tokens are counted. A batch of two is a prompt and its negative.
SHAPES = {shape.name: shape for shape in (
    Shape("Wan 1.3B 480p 81 frames", 12, 128, 32760),
    Shape("Wan 14B 480p 81 frames", 40, 128, 32760),
    Shape("Wan 14B 720p 81 frames", 40, 128, 75600),
    Shape("Wan 2.2 5B 720p 121 frames", 24, 128, 27280),
    Shape("MiniMax-H3 768p 5 s", 56, 128, 37296),
    Shape("HunyuanVideo 720p 129 frames", 24, 128, 119056),
    Shape("HunyuanVideo 1.5 720p 121 frames", 16, 128, 111600),
    Shape("Mochi 480p 163 frames", 24, 128, 44776),
    Shape("LTX-2 720p 121 frames", 32, 128, 14080),
    Shape("LTX-Video 512p 97 frames", 32, 64, 4992),
    Shape("Flux.1 1024x1024", 24, 128, 4608),
    Shape("Flux.2 1024x1024", 48, 128, 4608),
    Shape("Qwen-Image 1328x1328", 24, 128, 6889),
    Shape("Z-Image 1024x1024", 30, 128, 4192),
    Shape("SD3.5 Large 1024x1024", 38, 64, 4250, batch=2),
    Shape("SDXL 1024x1024", 10, 64, 4096, batch=2),
)}


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, heads, tokens, head_dim), the same each time, whose attention is local: tokens near each other
    in the sequence are alike, as in pictures and clips. K has a bias, V is white noise."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    q, k, v = (torch.empty(shape.batch, shape.heads, shape.tokens, shape.head_dim, dtype=dtype, device=device)
               for _ in range(3))
    place = torch.arange(shape.tokens, device=device, dtype=torch.float32)[:, None]
    for batch in range(shape.batch):
        for head in range(shape.heads):
            # Heads see from some dozens to some hundreds of tokens far.
            reach = 24 * 16 ** ((head + 0.5) / shape.heads)
            feature = (place * noise(1, shape.head_dim) / reach + 6.3 * noise(1, shape.head_dim)).cos()
            feature *= math.sqrt(16 / math.sqrt(shape.head_dim))  # the logarithm of the sharpest weight is about 8
            q[batch, head] = feature + 0.3 * noise(*feature.shape)
            k[batch, head] = feature + 0.3 * noise(*feature.shape) + noise(1, shape.head_dim)
            v[batch, head] = noise(*feature.shape)
    return q, k, v

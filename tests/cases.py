"""Attention inputs that several tests share."""
import torch
from torch import Tensor


def random_qkv(batch: int, heads: int, q_tokens: int, dim: int, *, k_tokens: int | None = None,
               kv_heads: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu",
               seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """White noise q (B, H, Nq, D), k, v (B, Hkv, Nk, D), with a bias on K that smoothing has to remove."""
    generator = torch.Generator(device).manual_seed(seed)
    kv = (batch, kv_heads or heads, q_tokens if k_tokens is None else k_tokens, dim)
    shapes = (batch, heads, q_tokens, dim), kv, kv
    q, k, v = (torch.randn(*shape, generator=generator, device=device) for shape in shapes)
    return tuple(x.to(dtype) for x in (q, k + 2.0, v))


def drifting_qkv(batch: int, heads: int, q_tokens: int, dim: int, *, k_tokens: int | None = None,
                 kv_heads: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu",
                 seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose tokens drift slowly along the sequence. Neighbours are similar, so means describe their blocks.

    Every head has its own contrast; its attention is local where the contrast is high.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    k_tokens, kv_heads = q_tokens if k_tokens is None else k_tokens, kv_heads or heads
    frequency = randn(1, 1, 1, dim) * 0.02
    phase = randn(1, 1, 1, dim) * 3

    def drift(heads, n):
        position = torch.arange(n, device=device, dtype=torch.float32)[:, None]
        contrast = torch.linspace(1.0, 2.5, heads, device=device)[:, None, None]
        return (position * frequency + phase).cos() * contrast + 0.2 * randn(batch, heads, n, dim)

    q, k = drift(heads, q_tokens), drift(kv_heads, k_tokens)
    v = randn(batch, kv_heads, k_tokens, dim)
    return tuple(x.to(dtype) for x in (q, k + randn(1, kv_heads, 1, dim), v))


def video_qkv(grid: tuple[int, int, int], heads: int, dim: int, *, batch: int = 1, text: int = 0,
              dtype: torch.dtype = torch.bfloat16, device: str = "cuda",
              contrast: tuple[float, float] = (6.0, 14.0), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (batch, heads, T·H·W + text, dim) whose attention is local in a (T, H, W) grid.

    Q and K are random Fourier features of the grid position plus noise. Heads differ in length scale and contrast, K
    carries a common bias, and V is white noise. Text tokens come last and are not local.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    low, high = contrast
    q, k = [], []
    for head in range(heads):
        lengths = torch.tensor([0.7 + 3 * (head + 0.5) / heads, 2.0 + 14 * (head * 7 % heads) / heads,
                                2.0 + 14 * (head * 5 % heads) / heads], device=device)
        angle = position @ (randn(3, dim // 2) / lengths[:, None])
        feature = torch.cat([angle.cos(), angle.sin()], -1) * (2 / dim) ** 0.5
        gain = low + (high - low) * torch.rand(1, generator=generator, device=device)
        feature = feature * (gain * dim ** 0.5) ** 0.5
        q.append(feature + 0.6 * randn(len(position), dim))
        k.append(feature + 0.6 * randn(len(position), dim) + 1.5 * randn(1, dim))
    q, k = (torch.stack(x).expand(batch, -1, -1, -1) for x in (q, k))
    if text:
        q, k = (torch.cat([x, randn(batch, heads, text, dim)], 2) for x in (q, k))
    return tuple(x.to(dtype).contiguous() for x in (q, k, randn(*q.shape)))

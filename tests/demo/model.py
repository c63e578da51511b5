"""Wan 2.1 text-to-video transformer in plain PyTorch, with a replaceable self-attention.

State-dict names and arithmetic are those of ComfyUI's ``WanModel``, so one safetensors file serves
this module and ComfyUI's own loader. The file's metadata entry ``config`` carries what ComfyUI's
detection cannot read off the tensors (``text_dim``, ``num_heads``).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parents[2] / "nodes/demo/wan_shapes.safetensors"  # ships with the pack
PATCH = (1, 2, 2)


@dataclass(frozen=True)
class WanConfig:
    dim: int = 256
    num_heads: int = 2
    num_layers: int = 6
    ffn_dim: int = 640
    text_dim: int = 64
    text_len: int = 16
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention over (B, H, N, D)."""
    return F.scaled_dot_product_attention(q, k, v)


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """(B,) timesteps in 0..1000 -> (B, dim) cosines and sines."""
    half = dim // 2
    angles = t.float()[:, None] * 10000.0 ** (-torch.arange(half, device=t.device) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotary_phases(grid: tuple[int, int, int], head_dim: int, device, theta: float = 10000.0) -> Tensor:
    """Unit complex numbers (T*H*W, head_dim/2): one rotation for each token and pair of channels."""
    sixth = head_dim // 6
    angles = []
    for axis, width in enumerate((head_dim - 4 * sixth, 2 * sixth, 2 * sixth)):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        position = torch.arange(grid[axis], dtype=torch.float64, device=device)
        shape = [1, 1, 1, width // 2]
        shape[axis] = grid[axis]
        angles.append(torch.outer(position, frequency).reshape(shape).expand(*grid, -1))
    angles = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x (B, N, H, D) by phases (N, D/2), in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases[:, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Projections and query/key RMSNorm shared by self- and cross-attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, phases: Tensor | None, attention) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1))
        v = self.v(context).unflatten(-1, (self.heads, -1))
        if phases is not None:
            q, k = rotate(q, phases), rotate(k, phases)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, c: WanConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.self_attn = Attention(c.dim, c.num_heads)
        self.norm3 = nn.LayerNorm(c.dim, eps=1e-6)
        self.cross_attn = Attention(c.dim, c.num_heads)
        self.norm2 = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(c.ffn_dim, c.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, c.dim))

    def forward(self, x: Tensor, e: Tensor, context: Tensor, phases: Tensor, attention) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e).chunk(6, dim=1)
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        x = torch.addcmul(x, self.self_attn(y, y, phases, attention), gate1)
        x = x + self.cross_attn(self.norm3(x), context, None, scaled_dot_product)
        return torch.addcmul(x, self.ffn(torch.addcmul(shift2, self.norm2(x), 1 + scale2)), gate2)


class Head(nn.Module):
    def __init__(self, c: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(c.dim, math.prod(PATCH) * c.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, c.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


class WanT2V(nn.Module):
    """Predicts the flow velocity ``noise - x0`` of a latent clip.

    ``attention`` is the self-attention of every block: a callable of q, k, v (B, H, N, D) with tokens
    in (t, h, w) row-major order; assign another one to replace it.
    """

    def __init__(self, config: WanConfig = WanConfig()):
        super().__init__()
        c = self.config = config
        self.attention = scaled_dot_product
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        self._phases: dict = {}

    def initialise(self) -> "WanT2V":
        """Weights to start training from: small residual branches and a zero output."""
        for name, p in self.named_parameters():
            if p.ndim > 1 and "modulation" not in name:
                nn.init.xavier_uniform_(p.flatten(1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for block in self.blocks:
            for linear in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                linear.weight.data.mul_((2 * len(self.blocks)) ** -0.5)
            block.modulation.data[:, [2, 5]] = 0.5
        self.time_projection[1].weight.data.mul_(0.1)
        nn.init.zeros_(self.head.head.weight)
        return self

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, 16, T, H, W) with even H and W, t (B,) in 0..1000, context (B, L, text_dim) -> like x."""
        b, c, frames, height, width = x.shape
        grid = (frames, height // 2, width // 2)
        # The patch convolution has stride = kernel: one matrix product on the unfolded patches.
        patches = x.reshape(b, c, grid[0], grid[1], 2, grid[2], 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        x = F.linear(patches.flatten(1, 3), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

        e = self.time_embedding(timestep_features(t, self.config.freq_dim).type_as(x))
        e6 = self.time_projection(e).unflatten(1, (6, -1))
        context = self.text_embedding(context)
        phases = self.phases(grid, x.device)
        for block in self.blocks:
            x = block(x, e6, context, phases, self.attention)

        x = self.head(x, e).unflatten(1, grid).unflatten(-1, (2, 2, -1))  # [B, T, h, w, 2, 2, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, frames, height, width)

    def phases(self, grid: tuple[int, int, int], device) -> Tensor:
        key = (grid, device)
        if key not in self._phases:
            self._phases[key] = rotary_phases(grid, self.config.dim // self.config.num_heads, device)
        return self._phases[key]


def save(path: str | Path, state: dict[str, Tensor], config: WanConfig, dtype=torch.float16) -> None:
    """Write weights as one safetensors file that ComfyUI's loader accepts; refuses values that overflow."""
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    bad = [k for k, v in state.items() if not v.isfinite().all()]
    if bad:
        raise ValueError(f"state must be finite in {dtype}, not so: {bad}")
    keys = ("num_heads", "text_dim", "text_len")
    transformer = {k: v for k, v in asdict(config).items() if k in keys}
    save_file(state, path, metadata={"config": json.dumps({"transformer": transformer})})


def load(path: str | Path, device="cpu", dtype=torch.float32) -> WanT2V:
    """Read such a file: sizes from the tensors, the rest from the metadata."""
    state = load_file(path)
    with safe_open(path, "pt") as f:
        extra = json.loads(f.metadata()["config"])["transformer"]
    layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    config = WanConfig(
        dim=state["head.modulation"].shape[-1],
        num_layers=layers,
        ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
        freq_dim=state["time_embedding.0.weight"].shape[1],
        **extra,
    )
    model = WanT2V(config)
    model.load_state_dict(state)
    return model.to(device, dtype).eval().requires_grad_(False)

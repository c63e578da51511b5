"""Procedural clips in Wan's 16-channel latent space, drawn from prompts.

A clip shows one or two textured shapes moving over a panning background. It is drawn as RGB at latent
resolution together with 13 feature planes (masks, texture phases, edges), then lifted to 16 channels:
Wan's latent preview of the result is the RGB picture, and the features lie in the 13 dimensions that the
preview cannot see. Latents are in the model's space (ComfyUI's ``process_in`` side).
"""

import math
from functools import cache

import torch
from torch import Tensor

from comfyui_spargeattn.nodes.demo.words import MOTIONS, SLOTS

_RGB = torch.tensor([
    [0.95, 0.10, 0.10], [1.00, 0.50, 0.05], [0.98, 0.90, 0.10], [0.10, 0.80, 0.20],
    [0.10, 0.85, 0.90], [0.10, 0.25, 0.95], [0.65, 0.15, 0.85], [0.95, 0.95, 0.95],
])
_STEP = torch.tensor([[1.0, 0], [-1, 0], [0, -1], [0, 1], [0, 0], [0, 0], [0, 0]])  # x, y of each motion

# Linear preview of a Wan 2.1 latent: rgb in -1..1 = latent @ factors + bias.
_PREVIEW = torch.tensor([
    [-0.1299, -0.1692, 0.2932], [0.0671, 0.0406, 0.0442], [0.3568, 0.2548, 0.1747], [0.0372, 0.2344, 0.1420],
    [0.0313, 0.0189, -0.0328], [0.0296, -0.0956, -0.0665], [-0.3477, -0.4059, -0.2925], [0.0166, 0.1902, 0.1975],
    [-0.0412, 0.0267, -0.1364], [-0.1293, 0.0740, 0.1636], [0.0680, 0.3019, 0.1128], [0.0032, 0.0581, 0.0639],
    [-0.1251, 0.0927, 0.1699], [0.0060, -0.0633, 0.0005], [0.3477, 0.2275, 0.2950], [0.1984, 0.0913, 0.1861],
])
_PREVIEW_BIAS = torch.tensor([-0.1835, -0.0868, -0.3360])

# Measured mean of the feature planes, and divisors that bring them to a deviation of 0.6 to 0.9. Planes that
# are zero nearly everywhere (the small object, the edges) would get very high peaks if brought to 1.
_FEATURE_MEAN = torch.tensor([0.146, 0.028, 0.597, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.037])
_FEATURE_SCALE = torch.tensor([0.36, 0.25, 0.65, 0.25, 0.25, 0.35, 0.35, 0.7, 0.7, 0.22, 0.06, 0.06, 0.06])


def preview(latent: Tensor) -> Tensor:
    """(..., 16, T, H, W) model-space latent -> (..., T, H, W, 3) RGB in 0..1."""
    rgb = latent.movedim(-4, -1).float() @ _PREVIEW.to(latent.device) + _PREVIEW_BIAS.to(latent.device)
    return (rgb / 2 + 0.5).clamp(0, 1)


@cache
def _lift(device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 16) inverse of the preview and (13, 16) orthonormal basis of what it does not see."""
    factors = _PREVIEW.double()
    unseen = torch.linalg.svd(factors.T).Vh[3:]
    return torch.linalg.pinv(factors).float().to(device), unseen.float().to(device)


@cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Colours, motion steps, preview bias, feature means and scales on the device; made once, since a copy
    from host memory cannot be recorded in a CUDA graph."""
    return tuple(x.to(device) for x in (_RGB, _STEP, _PREVIEW_BIAS, _FEATURE_MEAN, _FEATURE_SCALE))


def random_prompts(count: int, device, generator: torch.Generator | None = None) -> Tensor:
    """(count, 11) word indices; half of them have a second object."""
    def draw(low, high):
        return torch.randint(low, high, (count,), device=device, generator=generator)

    columns = [draw(0, len(slot)) for slot in SLOTS[:4]]
    second = draw(0, 2)
    columns += [second * draw(1, len(slot)) for slot in SLOTS[4:8]]
    columns += [draw(0, len(slot)) for slot in SLOTS[8:]]
    return torch.stack(columns, dim=1)


def _shape_distance(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Signed distance (about, in radii; negative inside) to each clip's shape, coordinates (B, T, H, W)."""
    radius = torch.sqrt(x * x + y * y + 1e-6)
    angle = torch.atan2(x, -y)

    def polygon(corners):  # distance along the nearest side's normal
        sector = math.tau / corners
        return radius * torch.cos(torch.remainder(angle, sector) - sector / 2)

    spike = 2 * (angle * 5 / math.tau - torch.round(angle * 5 / math.tau)).abs()
    distances = torch.stack([
        radius - 0.95,
        torch.maximum(x.abs(), y.abs()) - 0.82,
        polygon(3) - 0.56,
        radius - 1.15 + 0.62 * spike,
        (radius - 0.72).abs() - 0.26,
    ])
    return distances[shape, torch.arange(len(shape), device=shape.device)]


def _texture(px: Tensor, py: Tensor, kind: Tensor) -> Tensor:
    """Brightness 0..1 of each clip's texture at phases px, py in radians."""
    sx, sy = px.sin(), py.sin()
    kinds = torch.stack([
        torch.ones_like(sx),
        0.5 + 0.5 * torch.tanh(2.5 * sx),
        0.5 + 0.5 * torch.tanh(4 * sx * sy),
        torch.sigmoid(5 * (0.9 - sx - sy)),
    ])
    return kinds[kind, torch.arange(len(kind), device=kind.device)]


class _Scene:
    """Coordinates and random draws shared by the layers of one batch. Lengths are in half frame heights."""

    def __init__(self, batch: int, grid: tuple[int, int, int], device, generator):
        frames, height, width = grid
        self.batch, self.device, self.generator = batch, device, generator
        self.colours, self.steps = _tables(device)[:2]
        self.aspect = width / height
        self.pixel = 2 / height
        self.wave = math.tau / (1.7 * math.sqrt(height) * self.pixel)  # radians per unit length
        self.t = (torch.arange(frames, device=device) - (frames - 1) / 2).view(1, -1, 1, 1)
        self.y = ((torch.arange(height, device=device) + 0.5) * self.pixel - 1).view(1, 1, -1, 1)
        self.x = ((torch.arange(width, device=device) + 0.5) * self.pixel - self.aspect).view(1, 1, 1, -1)

    def uniform(self, low: float, high: float) -> Tensor:
        draw = torch.rand(self.batch, 1, 1, 1, device=self.device, generator=self.generator)
        return low + (high - low) * draw


def _draw_object(scene: _Scene, words: Tensor, cx: Tensor, cy: Tensor, size: Tensor) -> dict[str, Tensor]:
    """One textured shape for each clip; words (B, 4), centre and size (B, 1, 1, 1)."""
    shape, colour, texture, motion = words.unbind(1)
    step = 0.05 * scene.steps[motion].view(-1, 2, 1, 1, 1)
    orbit, spin, pulse = ((motion == MOTIONS.index(m)).view(-1, 1, 1, 1) for m in ("orbit", "spin", "pulse"))
    turn = scene.uniform(0, math.tau) + scene.t * (math.tau / 20)
    cx = cx + step[:, 0] * scene.t + orbit * 0.35 * turn.cos()
    cy = cy + step[:, 1] * scene.t + orbit * 0.35 * turn.sin()
    size = size * (1 + 0.3 * pulse * torch.sin(turn))
    angle = scene.uniform(-0.3, 0.3) + spin * scene.t * (math.tau / 28)

    dx, dy = scene.x - cx, scene.y - cy
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    distance = _shape_distance(along / size, across / size, shape) * size / scene.pixel
    phase = scene.uniform(0, math.tau)
    px, py = scene.wave * along + phase, scene.wave * across + phase
    light = (0.35 + 0.65 * _texture(px, py, texture)) * (1 - 0.12 * (along**2 + across**2) / size**2)
    rgb = scene.colours[colour].view(-1, 1, 1, 1, 3) * light.clamp_min(0)[..., None]
    return {"mask": torch.sigmoid(-2 * distance), "distance": distance, "rgb": rgb,
                "x": along / size, "y": across / size, "px": px, "py": py}


def _draw_background(scene: _Scene, words: Tensor) -> dict[str, Tensor]:
    colour, texture, pan = words.unbind(1)
    step = 0.12 * math.tau * scene.steps[pan].view(-1, 2, 1, 1, 1)
    px = scene.wave * 0.8 * scene.x - step[:, 0] * scene.t + scene.uniform(0, math.tau)
    py = scene.wave * 0.8 * scene.y - step[:, 1] * scene.t + scene.uniform(0, math.tau)
    px, py = px.expand_as(px + py), py.expand_as(px + py)
    slope = 0.5 + 0.25 * (scene.x / scene.aspect + scene.y)
    light = (0.5 + 0.5 * _texture(px, py, texture)) * (0.2 + 0.35 * slope)
    tint = 0.75 * scene.colours[colour].view(-1, 1, 1, 1, 3) + 0.15
    return {"rgb": tint * light[..., None], "px": px, "py": py, "slope": (slope - 0.5).expand_as(px)}


def _difference(x: Tensor, dim: int) -> Tensor:
    return (x.roll(-1, dim) - x.roll(1, dim)) / 2


def render(prompts: Tensor, grid: tuple[int, int, int], generator=None) -> tuple[Tensor, Tensor]:
    """Draw clips of latent grid (T, H, W): RGB (B, T, H, W, 3) in 0..1 and features (B, T, H, W, 13)."""
    scene = _Scene(len(prompts), grid, prompts.device, generator)
    two = (prompts[:, 4] > 0).view(-1, 1, 1, 1)
    side = scene.uniform(-1, 1).sign()
    offset = two * side * scene.aspect * 0.4
    first = _draw_object(
        scene, prompts[:, :4], offset + scene.uniform(-0.15, 0.15), scene.uniform(-0.2, 0.2), scene.uniform(0.5, 0.65)
    )
    second = _draw_object(
        scene,
        (prompts[:, 4:8] - 1).clamp_min(0),
        scene.uniform(-0.15, 0.15) - offset,
        scene.uniform(-0.4, 0.4),
        scene.uniform(0.28, 0.38),
    )
    back = _draw_background(scene, prompts[:, 8:])

    m2 = second["mask"] * two
    m1 = first["mask"] * (1 - m2)
    m0 = 1 - m1 - m2
    rgb = m1[..., None] * first["rgb"] + m2[..., None] * second["rgb"] + m0[..., None] * back["rgb"]
    luma = rgb.mean(-1)
    near = torch.minimum(first["distance"], second["distance"] + 1e3 * ~two)
    gx, gy = _difference(luma, 3), _difference(luma, 2)
    features = torch.stack([
        m1, m2, torch.tanh(near / 4),
        m1 * first["x"] + m2 * second["x"], m1 * first["y"] + m2 * second["y"],
        m1 * first["px"].sin() + m2 * second["px"].sin(), m1 * first["py"].sin() + m2 * second["py"].sin(),
        m0 * back["px"].sin(), m0 * back["py"].sin(), m0 * back["slope"],
        gx, gy, torch.sqrt(gx**2 + gy**2 + 1e-4),
    ], dim=-1)
    return rgb, features


def clips(prompts: Tensor, grid: tuple[int, int, int], generator=None) -> Tensor:
    """Latents (B, 16, T, H, W) of the prompts (B, 11), on the prompts' device, fp32."""
    rgb, features = render(prompts, grid, generator)
    seen, unseen = _lift(prompts.device)
    _, _, bias, mean, scale = _tables(prompts.device)
    latent = (2 * rgb - 1 - bias) @ seen + (features - mean) / scale @ unseen
    return latent.movedim(-1, 1).contiguous()

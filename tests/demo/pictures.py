"""The demo's pictures: clips side by side, and block maps."""

from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from .sampling import frames

BAR = 18  # height of a caption
GAP = 6
INK, PAPER = (230, 230, 230), (24, 24, 28)
KEPT, SKIPPED = (250, 170, 60), (40, 40, 60)


def _caption(page: Image.Image, x: int, y: int, text: str) -> None:
    ImageDraw.Draw(page).text((x + 3, y + 3), text, fill=INK)


def side_by_side(path: Path, captions: list[str], latents: list[Tensor]) -> None:
    """Animated WebP of latents (16, T, H, W), one column each, about 1000 pixels wide."""
    scale = max(1, 1000 // (len(latents) * latents[0].shape[-1]))
    columns = [frames(latent, scale) for latent in latents]
    width, height = columns[0][0].size
    pages = []
    for moment in zip(*columns):
        page = Image.new("RGB", (len(columns) * (width + GAP) - GAP, height + BAR), PAPER)
        for i, (image, caption) in enumerate(zip(moment, captions)):
            page.paste(image, (i * (width + GAP), BAR))
            _caption(page, i * (width + GAP), 0, caption)
        pages.append(page)
    pages += pages[-2:0:-1]  # back again, so that the loop has no jump
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=140, loop=0, quality=85)


def block_maps(path: Path, maps: Tensor, tile: int = 240) -> None:
    """PNG of bool (layers, heads, q_blocks, k_blocks): a row for each head, a column for each layer.

    Computed blocks are bright.
    """
    layers, heads, q_blocks, k_blocks = maps.shape
    page = Image.new("RGB", (layers * (tile + GAP) - GAP, heads * (tile + BAR + GAP) - GAP), PAPER)
    for layer in range(layers):
        for head in range(heads):
            one = maps[layer, head]
            x, y = layer * (tile + GAP), head * (tile + BAR + GAP)
            mask = Image.frombytes("L", (k_blocks, q_blocks), (one.byte() * 255).contiguous().numpy().tobytes())
            # A map with more blocks than the tile has pixels is averaged; with fewer blocks it keeps sharp squares.
            filtering = Image.Resampling.BOX if max(q_blocks, k_blocks) > tile else Image.Resampling.NEAREST
            page.paste(SKIPPED, (x, y + BAR, x + tile, y + BAR + tile))
            page.paste(KEPT, (x, y + BAR), mask.resize((tile, tile), filtering))
            _caption(page, x, y, f"block {layer}, head {head}: {one.float().mean().item():.0%} computed")
    page.save(path)

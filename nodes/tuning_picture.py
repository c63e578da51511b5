"""Pictures of tuned parameters: a cell for each layer (row) and head (column)."""
from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .tuned import TunedParams

_PAPER, _INK, _UNUSED = (250, 250, 247), (40, 40, 40), (225, 225, 222)
# Ends of the scales: nothing skipped to everything skipped; no error to the bound.
_SPARSITY = (255, 255, 229), (0, 90, 50)
_ERROR = (255, 247, 236), (179, 0, 0)
_GAP, _TITLE, _LABEL = 12, 22, 96


def report(params: TunedParams) -> Image.Image:
    """Sparsity beside the errors, on the calls tuned on and where there are any on others, with a title over each."""
    names = list(params.layers)
    searches = [params.layers[name].search for name in names]
    l2 = params.bounds.l2
    panels = [("sparsity, 0 to 100%", [x.sparsity for x in searches], 1.0, _SPARSITY),
              (f"L1 when tuned, 0 to {l2:g}", [x.error for x in searches], l2, _ERROR)]
    if params.unseen_error is not None:
        panels.append((f"L1 with another seed, 0 to {l2:g}", [x.unseen for x in searches], l2, _ERROR))
    heads = max((x.heads for x in searches), default=1)
    cell = max(4, min(24, 480 // heads, 960 // max(1, len(names))))
    width = max(190, heads * cell)
    page = Image.new("RGB", (_LABEL + len(panels) * (width + _GAP), 2 * _TITLE + max(1, len(names)) * cell + _GAP),
                     _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    draw.text((_GAP, 5), _plain(str(params)), fill=_INK, font=font)
    for i, (title, rows, top, scale) in enumerate(panels):
        x = _LABEL + i * (width + _GAP)
        draw.text((x, _TITLE + 4), title, fill=_INK, font=font)
        _heat_map(draw, x, 2 * _TITLE, cell, rows, top, scale)
    every = max(1, -(-12 // cell))  # of the labels, as many as fit
    for row in range(0, len(names), every):
        draw.text((_GAP, 2 * _TITLE + row * cell + (cell - 10) // 2), names[row][:14], fill=_INK, font=font)
    return page


def _heat_map(draw: ImageDraw.ImageDraw, left: int, top: int, cell: int, rows: list[Tensor], most: float,
              scale: tuple) -> None:
    for y, values in enumerate(rows):
        for x, value in enumerate(values.tolist()):
            share = min(1.0, value / most)
            colour = tuple(round(a + (b - a) * share) for a, b in zip(*scale)) if value > 0 else _UNUSED
            corner = left + x * cell, top + y * cell
            draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=colour)


def _plain(text: str) -> str:
    """PIL's own font has Latin letters alone."""
    return text.encode("latin-1", "replace").decode("latin-1")


def as_image(picture: Image.Image) -> Tensor:
    """ComfyUI's IMAGE of one picture: float32 (1, H, W, 3) in 0 … 1."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(1, picture.height, picture.width, 3).float() / 255

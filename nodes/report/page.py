"""Reports as pictures, drawn with Pillow, which every ComfyUI has.

A preview in the editor is about 400 pixels wide, half of this: letters are large, and the picture brings its own
background, so that it reads the same in dark and light themes.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .panels import QUANTISED, SPARSE, Panels

WIDTH = 768
_MARGIN = 24
_INNER = WIDTH - 2 * _MARGIN
_LABELS = 110  # width of the names of a heat map's rows
_NAMES = 288  # width of the names of bars
_NUMBERS = 150  # width of what stands behind the longest bar
_MAP = 340  # side of the block map
_SIDE = 2 * _MARGIN + _MAP  # left edge of what stands beside the block map
# The font that Pillow brings has no other glyphs than these.
_GLYPHS = str.maketrans({"×": "x", "–": "-", "θ": "theta", "τ": "tau", "λ": "lambda"})
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    ramp: of the share that is skipped; its ends are the colours of what is computed and of what is skipped.
    errors: of an error, from nothing to the largest allowed.
    dense: of calls that stayed dense, in turns by reason; all of them grey.
    """

    background: Color
    text: Color
    faint: Color
    alarm: Color
    ramp: tuple[Color, ...] = ((52, 62, 134), (33, 105, 146), (36, 158, 137), (140, 214, 78), (253, 231, 37))
    errors: tuple[Color, ...] = ((44, 56, 78), (86, 140, 196), (214, 232, 250))
    dense: tuple[Color, ...] = ((130, 134, 142), (98, 102, 110), (166, 170, 178))


THEMES = {
    "dark": Theme((24, 26, 31), (232, 234, 238), (166, 170, 179), (255, 122, 104)),
    "light": Theme((250, 250, 252), (28, 30, 36), (92, 96, 106), (196, 46, 28)),
}


def draw_report(panels: Panels, theme: Theme) -> Image.Image:
    """RGB, `WIDTH` wide and as tall as it needs to be."""
    page = Page(theme)
    page.text(panels.headline, 34, theme.alarm if panels.failed else theme.text)
    for note in panels.notes:
        page.text(note, 22, theme.alarm if panels.failed else theme.text)
    if panels.cells:
        page.title("Attention skipped, by block (down) and step (across)")
        page.heat_map(panels.cells)
    if panels.calls:
        page.title("Attention calls")
        page.bar(panels.calls, panels.sparsity)
    if panels.map_title:
        page.title(panels.map_title)
    left, bottom = _MARGIN, page.y
    if panels.block_map is not None:
        bottom = page.block_map(panels.block_map)
        left = _SIDE
    if panels.settings:
        page.title("Settings", left)
        for line in panels.settings:
            page.text(line, 20, theme.faint, left)
    page.y = max(page.y, bottom)
    return page.finish()


class Page:
    """A picture `WIDTH` wide that is filled from the top down."""

    def __init__(self, theme: Theme):
        self.theme = theme
        self.image = Image.new("RGB", (WIDTH, 4096), theme.background)
        self.draw = ImageDraw.Draw(self.image)
        self.y = _MARGIN

    def finish(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, min(self.y + _MARGIN, self.image.height)))

    def text(self, text: str, size: int, color: Color, left: int = _MARGIN) -> None:
        for line in self._wrap(text.translate(_GLYPHS), size, WIDTH - _MARGIN - left):
            self.draw.text((left, self.y), line, font=_font(size), fill=color)
            self.y += round(size * 1.3)

    def title(self, text: str, left: int = _MARGIN) -> None:
        self.y += 18
        self.text(text, 24, self.theme.text, left)
        self.y += 4

    def heat_map(self, cells: Mapping[tuple[Any, int], float | None], height: int = 480,
                 ends: tuple[str, str] = ("computed", "skipped"), above: str = "") -> None:
        """
        cells: {(row, column): share from 0 to 1, None for dense}, rows in order.
        ends: what 0 and 1 are.
        above: what more than 1 is, for errors, which have colours of their own; empty where no share is more.
        """
        shades = _shades(self.theme.errors if above else self.theme.ramp)
        rows = {row: i for i, row in enumerate(dict.fromkeys(row for row, _ in cells))}
        first, last = min(column for _, column in cells), max(column for _, column in cells)
        colors = np.full((len(rows), last - first + 1, 3), self.theme.background, np.uint8)
        for (row, column), share in cells.items():
            colors[rows[row], column - first] = (
                self.theme.dense[0] if share is None else self.theme.alarm if above and share > 1
                else shades[round(255 * min(max(share, 0.0), 1.0))])

        wide = (_INNER - _LABELS) / colors.shape[1]
        tall = max(3.0, min(26.0, height / len(rows)))
        down, across = _cells_of_pixels(len(rows), tall), _cells_of_pixels(colors.shape[1], wide)
        pixels = colors[down][:, across]
        if min(wide, tall) >= 6:  # a gap after each cell
            pixels[np.diff(down, append=-1) != 0] = self.theme.background
            pixels[:, np.diff(across, append=-1) != 0] = self.theme.background
        left = _MARGIN + _LABELS
        self.image.paste(Image.fromarray(pixels), (left, self.y))

        names = list(rows)
        for i in range(0, len(names), max(1, round(24 / tall))):
            self._small(str(names[i]), _MARGIN, self.y + tall * i - 2)
        self.y += len(down) + 6
        for column in range(first, last + 1, max(1, round(60 / wide))):
            self._small(str(column), left + wide * (column - first), self.y)
        self.y += 32
        self._legend(shades, *ends, above)

    def _legend(self, shades: np.ndarray, low: str, high: str, above: str) -> None:
        left, width, tall = _MARGIN + _LABELS, 180, 19
        ramp = shades[_cells_of_pixels(256, width / 256)]
        self.image.paste(Image.fromarray(np.repeat(ramp[None], tall, axis=0)), (left, self.y + 2))
        self._small(low, left - 8 - _font(19).getlength(low), self.y)
        self._small(high, left + width + 8, self.y)
        self._swatch(left + 286, "stayed dense", self.theme.dense[0])
        if above:
            self._swatch(left + 446, above, self.theme.alarm)
        self.y += 30

    def _swatch(self, left: int, label: str, *colors: Color) -> None:
        """A square, in equal stripes of `colors`, and what they mean."""
        for i, color in enumerate(colors):
            wide = 19 // len(colors)
            self.image.paste(color, (left + i * wide, self.y + 2, left + (i + 1) * wide, self.y + 21))
        self._small(label, left + 26, self.y)

    def bar(self, calls: Sequence[tuple[str, int]], sparsity: float | None) -> None:
        """sparsity: mean share skipped by the sparse calls, None where it is not known."""
        computed, skipped = self.theme.ramp[0], self.theme.ramp[-1]
        total, left, dense = sum(count for _, count in calls), float(_MARGIN), cycle(self.theme.dense)
        parts: list[tuple[str, list[tuple[Color, float]]]] = []
        for label, count in calls:
            text, shares = f"{count} ({count / total:.0%})  {label}", [(computed, 1.0)]
            if label == SPARSE and sparsity is not None:
                text += f": {sparsity:.1%} skipped, the rest computed"
                shares = [(skipped, sparsity), (computed, 1 - sparsity)]
            elif label != SPARSE and not label.startswith(QUANTISED):
                shares = [(next(dense), 1.0)]
            parts.append((text, [(color, share * count / total) for color, share in shares]))
        for _, shares in parts:
            for color, share in shares:
                right = left + _INNER * share
                if right - left >= 1:
                    self.draw.rectangle((left, self.y, right - 1, self.y + 28), fill=color)
                left = right
        self.y += 38
        for label, shares in parts:
            self._swatch(_MARGIN, "", *(color for color, _ in shares))
            self.text(label, 20, self.theme.faint, left=_MARGIN + 28)

    def time_bar(self, name: str, share: float | None, text: str, color: Color) -> None:
        """A bar, its name and its number. share: of the length of the longest; None for no bar."""
        self._small(name, _MARGIN, self.y + 3)
        left = right = _MARGIN + _NAMES
        if share is not None:
            right = left + max(2, round(share * (WIDTH - _MARGIN - left - _NUMBERS)))
            self.draw.rectangle((left, self.y, right, self.y + 27), fill=color)
            right += 10
        first, *more = self._wrap(text.translate(_GLYPHS), 19, WIDTH - _MARGIN - right)
        self._small(f"{first} ..." if more else first, right, self.y + 3)
        self.y += 34

    def block_map(self, attended: Tensor) -> int:
        """Draw a block map and its legend beside it, below which is room; returns the y of its lower edge.

        attended: uint8 (rows, columns), 255 where every pair of a pixel is attended.
        """
        image = Image.fromarray(_shades(self.theme.ramp)[255 - attended.numpy()])
        self.image.paste(image.resize((_MAP, _MAP), Image.Resampling.NEAREST), (_MARGIN, self.y))
        bottom = self.y + _MAP
        for line in ("down: blocks of queries", "across: blocks of keys"):
            self.text(line, 20, self.theme.faint, _SIDE)
        self._swatch(_SIDE, "computed", self.theme.ramp[0])
        self._swatch(_SIDE + 150, "skipped", self.theme.ramp[-1])
        self.y += 26
        return bottom

    def _small(self, text: str, x: float, y: float) -> None:
        self.draw.text((round(x), round(y)), text.translate(_GLYPHS), font=_font(19), fill=self.theme.faint)

    def _wrap(self, text: str, size: int, width: int) -> list[str]:
        lines = [""]
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if lines[-1] and _font(size).getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines


def _shades(ramp: Sequence[Color]) -> np.ndarray:
    """A ramp in 256 steps: uint8 (256, 3)."""
    at, ends = np.linspace(0, 1, 256), np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(at, ends, channel) for channel in zip(*ramp)], 1).round().astype(np.uint8)


def _cells_of_pixels(cells: int, size: float) -> np.ndarray:
    """The index of the cell that each pixel shows, for cells of `size` pixels: (round(cells · size),)."""
    pixels = round(cells * size)
    return np.arange(pixels) * cells // pixels


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def as_image(picture: Image.Image) -> Tensor:
    """ComfyUI's IMAGE of one picture: float32 (1, H, W, 3) in 0 … 1."""
    return torch.from_numpy(np.array(picture)).float().div(255).unsqueeze(0)

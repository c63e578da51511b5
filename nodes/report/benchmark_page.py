"""A benchmark as a picture: bars of the times, the shortest of which is the fastest."""
from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...kernels.benchmark import Result, Timed, Tried
from .page import Color, Page, Theme


def draw_benchmark(result: Result, theme: Theme) -> Image.Image:
    """RGB, as wide as every report."""
    page = Page(theme)
    page.text(result.headline, 34, theme.text)
    page.text(str(result.shape), 22, theme.text)
    page.text(", ".join(f"{name} {value}" for name, value in result.machine.items()), 20, theme.faint)
    for note in result.notes:
        page.text(note, 22, theme.text)
    if result.dense is not None:
        page.title("Milliseconds of a call, and times as fast as dense")
        rows = [result.dense, *result.ours]
        _bars(page, rows, [theme.dense[0], *[theme.ramp[2]] * len(result.ours)],
              [_beside(row, result.ratio(row)) for row in rows])
    if result.tried:
        page.title(f"Milliseconds by launch configuration, 50% of the blocks, {result.pv_format}")
        table = result.tried[0].ms
        colors = [theme.ramp[-1] if row.config == (result.faster or result.tried[0].config) else theme.ramp[1]
                  for row in result.tried]
        _bars(page, result.tried, colors, [_beside(row, table / row.ms if table and row.ms else None, i == 0)
                                           for i, row in enumerate(result.tried)])
        page.y += 8
        if result.verdict:
            page.text(result.verdict, 22, theme.text)
        page.text("yellow: what calls take from now on", 20, theme.faint)
    return page.finish()


def _bars(page: Page, rows: Sequence[Timed | Tried], colors: Sequence[Color], beside: Sequence[str]) -> None:
    longest = max((row.ms for row in rows if row.ms is not None), default=1.0)
    for row, color, text in zip(rows, colors, beside):
        page.time_bar(row.name, None if row.ms is None else row.ms / longest, text, color)


def _beside(row: Timed | Tried, ratio: float | None, is_table: bool = False) -> str:
    if row.ms is None:
        return row.problem
    number = f"{row.ms:.3g}" if row.ms < 100 else f"{row.ms:.0f}"
    return f"{number}   the pack's" if is_table else number if ratio is None else f"{number}   {ratio:.2f} ×"

"""Tuned parameters as a picture: heat maps with a row for each layer and a column for each head."""
from __future__ import annotations

from PIL import Image

from ..log import log
from ..tuned.params import TunedParams
from .page import THEMES, WIDTH, Page

_TALL = 320  # of a heat map, so that three are seen at once


class TunedPictures:
    """Draws searches. Where that fails, the pages are blank and the log says so once: no picture ends a search."""

    def __init__(self):
        self._failed = False

    def __call__(self, tuned: TunedParams) -> Image.Image:
        if not self._failed:
            try:
                return draw_tuned(tuned)
            except Exception:  # fonts or the imaging library may fail in any way, and minutes of search are worth more
                self._failed = True
                log.warning("SpargeAttn: the report of the search can't be drawn", exc_info=True)
        return Image.new("RGB", (WIDTH, _TALL), THEMES["dark"].background)


def draw_tuned(tuned: TunedParams) -> Image.Image:
    """Sparsity, then the errors on the calls tuned on and, where there are any, on others."""
    page = Page(THEMES["dark"])
    page.text(f"{tuned.sparsity:.1%} of the attention can be skipped"
              + (f" between {tuned.refreshes} refreshes" if tuned.refreshes else ""), 34, page.theme.text)
    page.text(str(tuned), 20, page.theme.faint)
    page.title("Attention skipped, by layer (down) and head (across)")
    page.heat_map(_cells(tuned, "sparsity", 1.0), _TALL)
    _errors(page, tuned, "error", "when tuned")
    if tuned.unseen_error is not None:
        _errors(page, tuned, "unseen", "with another seed")
    return page.finish()


def _errors(page: Page, tuned: TunedParams, name: str, when: str) -> None:
    """Errors up to the bound in shades, those above it in the alarm's colour, and how many heads these are."""
    cells, bound = _cells(tuned, name, tuned.bounds.l2), f"{tuned.bounds.l2:g}"
    sparse = [share for share in cells.values() if share is not None]
    above = sum(share > 1 for share in sparse)
    page.title(f"Error (L1) {when}" + (f": {above} of {len(sparse)} heads above {bound}" if above else ""))
    page.heat_map(cells, _TALL, ("0", bound), f"above {bound}")


def _cells(tuned: TunedParams, name: str, most: float) -> dict[tuple[str, int], float | None]:
    """A field of every layer's search, as a share of `most`; None where the layer stays dense."""
    return {(key, head): None if layer.search.setting is None else value / most
            for key, layer in tuned.layers.items()
            for head, value in enumerate(getattr(layer.search, name).tolist())}

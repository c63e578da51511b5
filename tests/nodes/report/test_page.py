"""Reports as pictures, without ComfyUI."""
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report.page import THEMES, WIDTH, Page, draw_report
from comfyui_spargeattn.nodes.report.panels import SPARSE, failed_report
from comfyui_spargeattn.nodes.report.tuned_page import draw_tuned
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch
from comfyui_spargeattn.tests.nodes.report.reported import SETTINGS, panels_of, run
from comfyui_spargeattn.tests.nodes.tuned.planted import learnt


@pytest.mark.parametrize("theme", THEMES)
def test_sparse_calls_that_skip_nothing_are_not_painted_dense(theme):
    page = Page(THEMES[theme])
    cells = {(TransformerBlock("", 0), 1): None, (TransformerBlock("", 0), 2): 0.0, (TransformerBlock("", 0), 3): 1.0}
    page.heat_map(cells)
    wide = (WIDTH - 2 * 24 - 110) / 3
    colors = [page.image.getpixel((round(24 + 110 + wide * (i + 0.5)), 24 + 12)) for i in range(3)]
    ramp = THEMES[theme].ramp
    assert colors == [THEMES[theme].dense[0], ramp[0], ramp[-1]]


@pytest.mark.parametrize("theme", THEMES)
def test_picture_shows_every_panel(theme):
    override = SpargeOverride(SETTINGS)
    assert panels_of(override).failed
    run(override)
    panels = panels_of(override)
    picture = draw_report(panels, THEMES[theme])
    assert picture.width == WIDTH and 600 < picture.height < 2000
    for left_out in ({"cells": {}}, {"calls": ()}, {"block_map": None}):
        assert draw_report(replace(panels, **left_out), THEMES[theme]).height < picture.height
    # Settings stand beside a block map that has room for them.
    without_map = draw_report(replace(panels, block_map=None), THEMES[theme])
    assert draw_report(replace(panels, block_map=None, settings=()), THEMES[theme]).height < without_map.height
    assert draw_report(replace(panels, settings=()), THEMES[theme]).tobytes() != picture.tobytes()
    assert draw_report(replace(panels, settings=["a line"] * 50), THEMES[theme]).height > picture.height
    alarm = THEMES[theme].alarm
    colors = dict(map(reversed, draw_report(failed_report("Nothing"), THEMES[theme]).getcolors(1 << 20)))
    assert alarm in colors and alarm not in dict(map(reversed, picture.getcolors(1 << 20)))


@pytest.mark.parametrize("theme", THEMES)
def test_computed_and_skipped_have_one_colour_everywhere(theme):
    """In the ends of heat maps, in the bar, and in the block map."""
    computed, skipped = THEMES[theme].ramp[0], THEMES[theme].ramp[-1]
    assert {computed, skipped}.isdisjoint(THEMES[theme].dense)

    def drawn(draw):
        page = Page(THEMES[theme])
        draw(page)
        counts = {color: count for count, color in page.finish().getcolors(1 << 20)}
        return counts.get(computed, 0), counts.get(skipped, 0), counts

    calls = [(SPARSE, 30), ("dense: cross-attention", 10)]
    few, many, counts = drawn(lambda page: page.bar(calls, 0.75))
    assert 2.5 < many / few < 3.2 and counts[THEMES[theme].dense[0]] > 1000
    assert drawn(lambda page: page.bar(calls, None))[1] == 0
    attended = torch.tensor([[255, 0], [0, 0]], dtype=torch.uint8)
    few, many, _ = drawn(lambda page: setattr(page, "y", page.block_map(attended)))
    assert 2.8 < many / few < 3.2
    few, many, _ = drawn(lambda page: page.heat_map({("0", 1): 0.0, ("0", 2): 1.0}))
    assert few > 5000 and many > 5000


def test_errors_above_the_bound_are_marked():
    theme = THEMES["dark"]

    def alarms(errors):
        page = Page(theme)
        page.heat_map({("0", i): error for i, error in enumerate(errors)}, above="above 0.06")
        return {color: count for count, color in page.finish().getcolors(1 << 20)}[theme.alarm]

    legend = alarms([0.0, None, 1.0])
    assert legend < 500 and alarms([0.0, None, 1.001]) > legend + 4000


def test_picture_of_a_search_tells_heads_above_the_bound(monkeypatch):
    def unlike(setting):
        measured = learnt(setting)
        return measured._replace(error=measured.error * torch.tensor([1.0, 1.9, 2.4, 1.2]))

    bounds, said = Bounds(0.05, 0.06), []
    search = LayerSearch.start(4, 2, bounds).learn(learnt).evaluate(unlike)
    tuned = TunedParams(Architecture("WanModel", {}), bounds, {"0": TunedLayer(search, 128)}, {})
    monkeypatch.setattr(Page, "title", lambda page, text: said.append(text))
    draw_tuned(tuned)
    assert said[1:] == ["Error (L1) when tuned", "Error (L1) with another seed: 1 of 4 heads above 0.06"]

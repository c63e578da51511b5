"""Reports as pictures, without ComfyUI."""
from dataclasses import replace

import pytest

from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report.page import THEMES, WIDTH, Page, draw_report
from comfyui_spargeattn.nodes.report.panels import failed_report
from comfyui_spargeattn.tests.nodes.report.reported import SETTINGS, panels_of, run


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
    for left_out in ({"cells": {}}, {"calls": ()}, {"block_map": None}, {"settings": ()}):
        assert draw_report(replace(panels, **left_out), THEMES[theme]).height < picture.height
    alarm = THEMES[theme].alarm
    colors = dict(map(reversed, draw_report(failed_report("Nothing"), THEMES[theme]).getcolors(1 << 20)))
    assert alarm in colors and alarm not in dict(map(reversed, picture.getcolors(1 << 20)))

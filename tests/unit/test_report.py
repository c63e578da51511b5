"""What a report says and shows, without ComfyUI."""
import math
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_map
from comfyui_spargeattn.nodes.block_pictures import BlockPictures, MapRequest, shrink
from comfyui_spargeattn.nodes.blocks import Block, BlockList
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.pictures import THEMES, WIDTH, draw_report
from comfyui_spargeattn.nodes.policy import Settings
from comfyui_spargeattn.nodes.report_text import failed_report, run_report
from comfyui_spargeattn.nodes.run_summary import CallTimes

SETTINGS = Settings(SpargeParams(topk=0.5, similarity_threshold=-1.0), start_percent=0.3, min_tokens=256,
                    dense_blocks=BlockList.parse("2, 5-7"))
STEPS = 10
BLOCKS = 3


class Patcher:
    @staticmethod
    def get_model_object(name):
        return type("Sampling", (), {"percent_to_sigma": staticmethod(lambda percent: 1 - percent)})


def dense_attention(q, k, v, heads, **kwargs):
    return torch.zeros_like(q)


def run(override, tokens=512, numbered=True):
    """A run of ten steps and three blocks of two heads; returns the inputs of its last call."""
    schedule = torch.linspace(1, 0, STEPS + 1)
    generator = torch.Generator().manual_seed(0)
    override.on_pre_run(Patcher)
    for step in range(STEPS):
        timestep = schedule[step:step + 1].clone()
        override.on_prepare_state(Patcher, timestep, {"transformer_options": {
            "sample_sigmas": schedule, "optimized_attention_override": override}})
        for block in range(BLOCKS):
            q, k = torch.randn(2, 1, tokens, 2 * 32, generator=generator)
            options = {"block_index": block} if numbered else {}
            override(dense_attention, q, k, k, 2, transformer_options=options)
            override(dense_attention, q, k[:, :77], k[:, :77], 2, transformer_options=options)
    override.on_cleanup(Patcher)
    return q, k


def panels_of(override, block=None, head=0, step=0):
    return run_report(override.run.summary, override.settings, block, head, step)


def test_every_self_attention_call_has_a_cell():
    override = SpargeOverride(SETTINGS)
    run(override)
    summary = override.run.summary
    assert summary.cells.keys() == {(Block("", block), step) for block in range(3) for step in range(1, 11)}
    for (block, step), sparsity in summary.cells.items():
        assert (sparsity > 0) == (step >= 4 and block.index != 2), (block, step)


def test_calls_of_unnumbered_blocks_are_counted_within_the_step():
    override = SpargeOverride(replace(SETTINGS, dense_blocks=BlockList()))
    run(override, numbered=False)
    assert {row for row, _ in override.run.summary.cells} == {Block("call", index) for index in range(3)}
    assert not override.run.summary.by_block


def test_time_saved_compares_calls_of_one_shape():
    override = SpargeOverride(SETTINGS)
    run(override)
    [times] = override.run.summary.times
    assert times.calls == 14 and times.sparse > times.dense > 0  # the stand-in for dense attention does nothing
    assert override.run.summary.saved == pytest.approx(14 * (times.dense - times.sparse) / 1000)
    assert any("slower" in note for note in panels_of(override).notes)


def test_time_saved_is_unknown_without_dense_calls():
    override = SpargeOverride(replace(SETTINGS, start_percent=0.0, dense_blocks=BlockList()))
    run(override)
    assert override.run.summary.saved is None and override.run.summary.times[0].dense is None
    assert any("no time to compare with" in note for note in panels_of(override).notes)
    faster = replace(override.run.summary, times=(CallTimes(10, 20.0, 60.0),), seconds=2.0)
    assert run_report(faster, SETTINGS, None, 0, 0).notes[0] == (
        "Sparse calls took 0.2 s in place of 0.6 s: 3.00 × faster. The run took 2 s.")


def test_block_map_is_the_one_of_the_chosen_step():
    override = SpargeOverride(SETTINGS)
    override.run.map_request = MapRequest(STEPS, Block("", 1))
    q, k = run(override)
    kept = override.run.summary.maps
    # Ten steps: every second block, and the one that was asked for.
    assert kept.step == STEPS and kept.maps.keys() == {Block("", 0), Block("", 1)}
    override = SpargeOverride(replace(SETTINGS, dense_blocks=BlockList()))
    override.run.map_request = MapRequest(STEPS, Block("", 2))
    q, k = run(override)
    split = (x.view(1, -1, 2, 32) for x in (q, k))
    expected = block_map(*split, params=SETTINGS.params, layout="BNHD").mask()[0]
    assert torch.equal(override.run.summary.maps.maps[Block("", 2)], expected.to(torch.uint8) * 255)


def test_maps_come_from_few_calls_of_a_short_run():
    pictures = BlockPictures(steps=4)
    taken = []
    for index in range(16):
        if pictures.wants(2, Block("", index)):
            pictures.add(Block("", index), torch.ones(1, 2, 2, dtype=torch.bool))
            taken.append(index)
    assert taken == [0, 4, 8, 12]
    assert not pictures.wants(3, Block("", 5))


def test_unavailable_maps_say_why():
    override = SpargeOverride(SETTINGS)
    run(override)
    assert panels_of(override).map_title == "Block map: block 0, head 0, step 4"
    assert "next run" in panels_of(override, block=Block("", 1)).map_title
    assert "heads 0 to 1" in panels_of(override, head=2).map_title
    assert "step 9 will be kept in the next run" in panels_of(override, step=9).map_title


@pytest.mark.parametrize("size", ((5, 7), (128, 128), (129, 300), (1, 1000)))
def test_shrunk_map_keeps_the_share(size):
    mask = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) < 0.4
    small = shrink(mask)
    assert small.dtype == torch.uint8 and max(small.shape[1:]) <= 128
    tall, wide = (math.ceil(n / 128) for n in size)
    for row, column in ((0, 0), (small.shape[1] - 1, small.shape[2] - 1)):
        pixel = mask[:, row * tall:(row + 1) * tall, column * wide:(column + 1) * wide]
        expected = pixel.float().mean((1, 2)) * 255
        assert (small[:, row, column] - expected).abs().max() <= 0.51


def test_run_that_was_not_accelerated_tells_the_reason():
    override = SpargeOverride(replace(SETTINGS, min_tokens=4096))
    run(override)
    panels = panels_of(override)
    assert panels.failed and "Nothing was accelerated" in panels.headline
    text = panels.text()
    assert "fewer tokens than min_tokens (512 < 4096)" in text and "Lower min_tokens" in text
    assert "30 calls dense: cross-attention" in text


def test_error_leaves_a_report():
    override = SpargeOverride(replace(SETTINGS, start_percent=0.0))
    override.on_pre_run(Patcher)
    override.on_prepare_state(Patcher, torch.ones(1), {"transformer_options": {}})
    try:
        q = torch.randn(1, 512, 64)
        override(dense_attention, q, q, q, 2, transformer_options={"block_index": 0})
        raise RuntimeError("interrupted")
    except RuntimeError:
        override.on_cleanup(Patcher)
    assert panels_of(override).headline == "The run was interrupted"


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

"""What a report says and shows, without ComfyUI."""
import math
import time
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_map
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report.advice import about_little_skipped
from comfyui_spargeattn.nodes.report.page import SPARSE, THEMES, WIDTH, Page, draw_report
from comfyui_spargeattn.nodes.report.panels import failed_report, run_report
from comfyui_spargeattn.nodes.run.block_maps import BlockPictures, MapRequest, shrink
from comfyui_spargeattn.nodes.run.summary import CallTimes

SETTINGS = NodeSettings(SpargeParams(topk=0.5, similarity_threshold=-1.0), start_percent=0.3, min_tokens=256,
                    dense_blocks=ListedBlocks.parse("2, 5-7"))
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


@pytest.fixture(scope="module")
def finished():
    """After a run."""
    override = SpargeOverride(SETTINGS)
    run(override)
    return override


def test_every_self_attention_call_has_a_cell(finished):
    summary = finished.run.summary
    assert summary.cells.keys() == {(TransformerBlock("", block), step) for block in range(3) for step in range(1, 11)}
    for (block, step), sparsity in summary.cells.items():
        assert (sparsity is not None) == (step >= 4 and block.index != 2), (block, step)


def test_calls_of_unnumbered_blocks_are_counted_within_the_step():
    override = SpargeOverride(replace(SETTINGS, dense_blocks=ListedBlocks()))
    run(override, numbered=False)
    assert {row for row, _ in override.run.summary.cells} == {TransformerBlock("call", index) for index in range(3)}
    assert not override.run.summary.by_block


def test_time_saved_compares_calls_of_one_shape():
    override = SpargeOverride(SETTINGS)
    run(override)
    [times] = override.run.summary.times
    assert times.calls == 14 and times.sparse > times.dense > 0  # the stand-in for dense attention does nothing
    assert override.run.summary.saved == pytest.approx(14 * (times.dense - times.sparse) / 1000)
    [note] = run_report(replace(override.run.summary, reference=False), SETTINGS, None, 0, 0).notes
    assert "slower" in note


def test_time_saved_is_unknown_without_dense_calls():
    override = SpargeOverride(replace(SETTINGS, start_percent=0.0, dense_blocks=ListedBlocks()))
    run(override)
    assert override.run.summary.saved is None and override.run.summary.times[0].dense is None
    [note] = run_report(replace(override.run.summary, reference=False), SETTINGS, None, 0, 0).notes
    assert "no time to compare with" in note
    faster = replace(override.run.summary, reference=False, times=(CallTimes(10, 20.0, 60.0),), seconds=2.0)
    assert run_report(faster, SETTINGS, None, 0, 0).notes[0] == (
        "Sparse calls took 0.2 s in place of 0.6 s: 3.00 × faster. The run took 2 s.")


def test_block_map_is_the_one_of_the_chosen_step():
    override = SpargeOverride(SETTINGS)
    override.run.map_request = MapRequest(STEPS, TransformerBlock("", 1))
    q, k = run(override)
    kept = override.run.summary.maps
    # Ten steps: every second block, and the one that was asked for.
    assert kept.step == STEPS and kept.maps.keys() == {TransformerBlock("", 0), TransformerBlock("", 1)}
    override = SpargeOverride(replace(SETTINGS, dense_blocks=ListedBlocks()))
    override.run.map_request = MapRequest(STEPS, TransformerBlock("", 2))
    q, k = run(override)
    split = (x.view(1, -1, 2, 32) for x in (q, k))
    expected = block_map(*split, params=SETTINGS.params, layout="BNHD").mask()[0]
    assert torch.equal(override.run.summary.maps.maps[TransformerBlock("", 2)], expected.to(torch.uint8) * 255)


def test_maps_come_from_few_calls_of_a_short_run():
    pictures = BlockPictures(steps=4)
    taken = []
    for index in range(16):
        if pictures.wants(2, TransformerBlock("", index)):
            pictures.add(TransformerBlock("", index), torch.ones(1, 2, 2, dtype=torch.bool))
            taken.append(index)
    assert taken == [0, 4, 8, 12]
    assert not pictures.wants(3, TransformerBlock("", 5))


@pytest.mark.parametrize("asked,title", (
    ({}, "Block map: block 0, head 0, step 4"),
    ({"block": TransformerBlock("", 1)}, "No block map of block 1: it will be kept in the next run"),
    ({"block": TransformerBlock("", 2)}, "No block map of block 2: it stayed dense"),
    ({"block": TransformerBlock("", 77)}, "No block map of block 77: the blocks with at least 256 tokens are 0-2"),
    ({"block": TransformerBlock("single", 0)},
     "No block map of block single:0: the blocks with at least 256 tokens are 0-2"),
    ({"head": 2}, "No block map of head 2: the model has heads 0 to 1"),
    ({"step": 9}, "Block map: block 0, head 0, step 4 (step 9 will be kept in the next run)"),
    ({"step": 2}, "Block map: block 0, head 0, step 4 (step 2 was not sparse)"),
    ({"step": 11}, "Block map: block 0, head 0, step 4 (the run had 10 steps, no step 11)"),
))
def test_unavailable_maps_say_why(finished, asked, title):
    assert panels_of(finished, **asked).map_title == title


@pytest.mark.parametrize("step,reason", ((2, "step 2 was not sparse"), (11, "the run had 10 steps, no step 11")))
def test_map_of_a_step_that_was_asked_for_in_vain(step, reason):
    override = SpargeOverride(SETTINGS)
    override.run.map_request = MapRequest(step)
    run(override)
    panels = panels_of(override, step=step)
    assert panels.block_map is None and panels.map_title == f"No block map: {reason}"


def test_blocks_of_several_kinds_are_listed_by_kind(finished):
    rows = [TransformerBlock(*name) for name in (("single", 0), ("single", 1), ("double", 3), ("double", 5),
                                                 ("double", 4))]
    summary = replace(finished.run.summary, cells={(row, 1): 0.5 for row in rows})
    title = run_report(summary, SETTINGS, TransformerBlock("", 77), 0, 0).map_title
    assert title.endswith("are double:3-5, single:0-1")


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
    panels = panels_of(override)
    assert panels.headline == "The run was interrupted" and not panels.cells


def test_interrupted_run_is_not_blamed_for_staying_dense(caplog):
    """It may have ended before start_percent."""
    override = SpargeOverride(SETTINGS)
    override.on_pre_run(Patcher)
    override.on_prepare_state(Patcher, torch.ones(1), {"transformer_options": {}})
    q = torch.randn(1, 512, 64)
    override(dense_attention, q, q, q, 2, transformer_options={"block_index": 0})
    try:
        raise RuntimeError("interrupted")
    except RuntimeError:
        override.on_cleanup(Patcher)
    assert panels_of(override).headline == "The run was interrupted" and not caplog.records


def test_run_without_steps(caplog):
    override = SpargeOverride(SETTINGS)
    run(override)
    override.on_pre_run(Patcher)
    override.on_cleanup(Patcher)
    panels = panels_of(override)
    assert panels.failed and panels.headline == "The sampler took no step" and not panels.cells
    assert not caplog.records


def test_numbers_that_could_not_be_read_are_not_called_an_interruption(monkeypatch):
    override = SpargeOverride(SETTINGS)
    monkeypatch.setattr(BlockPictures, "fetch", lambda self: 1 / 0)
    run(override)
    panels = panels_of(override)
    assert panels.headline == "The numbers of this run could not be read, the log says why"
    assert panels.calls[0] == (SPARSE, 14)


@pytest.mark.parametrize("reason,advice", (
    ("fast kernels failed", "C compiler"), ("out of memory", "smaller"), ("no fast kernel", "triton-windows"),
    ("mask that differs from query to query", "only dense attention"), ("unsupported call", "report it"),
    ("unsupported dtype", "16 bits")))
def test_reasons_have_advice(finished, reason, advice):
    """Faults also where other calls of the run went sparse."""
    dense = replace(finished.run.summary, sparse=0, dense={reason: 3}, details={reason: "what happened"})
    panels = run_report(dense, SETTINGS, None, 0, 0)
    assert any(advice in note for note in panels.notes)
    assert (f"dense: {reason} (what happened)", 3) in panels.calls
    mixed = run_report(replace(dense, sparse=5), SETTINGS, None, 0, 0)
    fault = reason in ("fast kernels failed", "out of memory", "unsupported call")
    assert any(advice in note for note in mixed.notes) == fault


@pytest.mark.parametrize("params,wanted,unwanted", (
    (SpargeParams(cdf_threshold=0.99, similarity_threshold=0.5),
     ("lower similarity_threshold (0.5)", "less alike", "lower cdf_threshold (0.99)", "topk", "Tune"), "Lower"),
    (SpargeParams(cdf_threshold=0.99, similarity_threshold=-1.0), ("lower cdf_threshold (0.99)",), "similarity"),
    (SpargeParams(topk=0.98, similarity_threshold=0.5), ("Lower keep_percent (98)",), "similarity")))
def test_little_skipped_is_called_so_with_what_to_change(finished, params, wanted, unwanted):
    settings = replace(SETTINGS, params=params)
    for share, amount in ((0.0, "None"), (0.042, "Only 4.2%")):
        summary = replace(finished.run.summary, sparsity=share, skipped=share)
        panels = run_report(summary, settings, None, 0, 0)
        assert panels.notes[0].startswith(f"{amount} of the attention was skipped. ") and not panels.failed
        assert all(text in panels.notes[0] for text in wanted) and unwanted not in panels.notes[0]
        assert not any("outside start_percent" in note for note in panels.notes)
        assert panels.headline == ("4.2% of the attention skipped" if share else "None of the attention skipped")
    enough = replace(finished.run.summary, sparsity=0.05, skipped=0.05)
    assert not any("was skipped" in note for note in run_report(enough, settings, None, 0, 0).notes)


def test_little_skipped_because_of_dense_calls_says_which(finished):
    summary = replace(finished.run.summary, skipped=0.01)
    notes = run_report(summary, SETTINGS, None, 0, 0).notes
    assert notes[0] == "Only 1.0% of the attention was skipped, because most of it stayed dense."
    assert any("outside start_percent" in note for note in notes[1:])
    summary = replace(finished.run.summary, skipped=0.045, sparsity=0.06)  # most of it was sparse
    assert "Lower keep_percent" in run_report(summary, SETTINGS, None, 0, 0).notes[0]


def test_log_and_report_agree_on_little(caplog):
    override = SpargeOverride(replace(SETTINGS, params=SpargeParams(cdf_threshold=1.0), start_percent=0.0))
    run(override)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"SpargeAttn: {panels_of(override).notes[0]}" and "None of the attention was skipped" in line


def test_tuned_run_that_skips_little_asks_for_other_tuning(finished):
    summary = replace(finished.run.summary, sparsity=0.01, skipped=0.01)
    text = about_little_skipped(summary, replace(SETTINGS, tuned=object()))
    assert "larger l1" in text and "threshold" not in text


def test_a_cpu_has_nothing_to_say_about_speed(finished):
    assert finished.run.summary.reference
    text = panels_of(finished).text()
    assert "saves no time" in text and "faster" not in text and "slower" not in text


def test_similarity_threshold_is_no_setting_of_topk(finished):
    assert "similarity" not in panels_of(finished).text()
    settings = replace(SETTINGS, params=SpargeParams(similarity_threshold=0.3))
    assert "similarity_threshold 0.3" in run_report(finished.run.summary, settings, None, 0, 0).text()


def test_report_of_an_earlier_prompt_says_so():
    override = SpargeOverride(SETTINGS)
    override.run.running_prompt = lambda: "first"
    run(override)
    summary = override.run.summary
    assert summary.prompt == "first"
    first, second = (run_report(summary, SETTINGS, None, 0, 0, prompt) for prompt in ("first", "second"))
    ended = time.strftime("%Y-%m-%d at %H:%M", time.localtime(summary.ended))
    assert abs(time.time() - summary.ended) < 60
    assert second.notes[0] == ("This model was not sampled in this prompt. What follows is its last run, which ended "
                               f"on {ended}.")
    assert second.notes[1:] == first.notes and not any("prompt" in note for note in first.notes)


@pytest.mark.parametrize("theme", THEMES)
def test_sparse_calls_that_skip_nothing_are_not_painted_dense(theme):
    page = Page(THEMES[theme])
    cells = {(TransformerBlock("", 0), 1): None, (TransformerBlock("", 0), 2): 0.0, (TransformerBlock("", 0), 3): 1.0}
    page.heat_map(cells)
    wide = (WIDTH - 2 * 24 - 110) / 3
    colors = [page.image.getpixel((round(24 + 110 + wide * (i + 0.5)), 24 + 12)) for i in range(3)]
    scale = THEMES[theme].scale
    assert colors == [THEMES[theme].dense[0], scale[0], scale[-1]]


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

"""What a report says, without ComfyUI."""
import time
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_map
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report.panels import SPARSE, run_report
from comfyui_spargeattn.nodes.run.block_maps import BlockPictures, MapRequest
from comfyui_spargeattn.nodes.run.summary import CallTimes
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedParams
from comfyui_spargeattn.nodes.tuned.search import Bounds
from comfyui_spargeattn.tests.nodes.report.reported import SETTINGS, STEPS, dense_attention, panels_of, run
from comfyui_spargeattn.tests.nodes.stand_ins import Patcher


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
    [note] = run_report(replace(override.run.summary, reference=False), SETTINGS).notes
    assert "slower" in note


def test_time_saved_is_unknown_without_dense_calls():
    override = SpargeOverride(replace(SETTINGS, start_percent=0.0, dense_blocks=ListedBlocks()))
    run(override)
    assert override.run.summary.saved is None and override.run.summary.times[0].dense is None
    [note] = run_report(replace(override.run.summary, reference=False), SETTINGS).notes
    assert "no time to compare with" in note
    faster = replace(override.run.summary, reference=False, times=(CallTimes(10, 20.0, 60.0),), seconds=2.0)
    assert run_report(faster, SETTINGS).notes[0] == (
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
    title = run_report(summary, SETTINGS, MapRequest(block=TransformerBlock("", 77))).map_title
    assert title.endswith("are double:3-5, single:0-1")


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
    override.on_pre_run(Patcher())
    override.on_prepare_state(Patcher(), torch.ones(1), {"transformer_options": {}})
    try:
        q = torch.randn(1, 512, 64)
        override(dense_attention, q, q, q, 2, transformer_options={"block_index": 0})
        raise RuntimeError("interrupted")
    except RuntimeError:
        override.on_cleanup(Patcher())
    panels = panels_of(override)
    assert panels.headline == "The run was interrupted" and not panels.cells


def test_interrupted_run_is_not_blamed_for_staying_dense(caplog):
    """It may have ended before start_percent."""
    override = SpargeOverride(SETTINGS)
    override.on_pre_run(Patcher())
    override.on_prepare_state(Patcher(), torch.ones(1), {"transformer_options": {}})
    q = torch.randn(1, 512, 64)
    override(dense_attention, q, q, q, 2, transformer_options={"block_index": 0})
    try:
        raise RuntimeError("interrupted")
    except RuntimeError:
        override.on_cleanup(Patcher())
    assert panels_of(override).headline == "The run was interrupted" and not caplog.records


def test_run_without_steps(caplog):
    override = SpargeOverride(SETTINGS)
    run(override)
    override.on_pre_run(Patcher())
    override.on_cleanup(Patcher())
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


def test_a_cpu_has_nothing_to_say_about_speed(finished):
    assert finished.run.summary.reference
    panels = panels_of(finished)
    text = panels.text()
    assert panels.headline.endswith("(CPU reference)")
    assert "CPU" not in run_report(replace(finished.run.summary, reference=False), SETTINGS).text()
    assert "saves no time" in text and "faster" not in text and "slower" not in text


def test_similarity_threshold_is_no_setting_of_topk(finished):
    assert "similarity" not in panels_of(finished).text()
    settings = replace(SETTINGS, params=SpargeParams(similarity_threshold=0.3))
    assert "similarity_threshold 0.3" in run_report(finished.run.summary, settings).text()


def test_report_of_an_earlier_prompt_says_so():
    override = SpargeOverride(SETTINGS)
    override.run.running_prompt = lambda: "first"
    run(override)
    summary = override.run.summary
    assert summary.prompt == "first"
    first, second = (run_report(summary, SETTINGS, prompt=prompt) for prompt in ("first", "second"))
    ended = time.strftime("%Y-%m-%d at %H:%M", time.localtime(summary.ended))
    assert abs(time.time() - summary.ended) < 60
    assert second.notes[0] == ("This model was not sampled in this prompt. What follows is its last run, which ended "
                               f"on {ended}.")
    assert second.notes[1:] == first.notes and not any("prompt" in note for note in first.notes)


def test_calls_without_tuned_parameters_are_listed(finished):
    untuned = {f"nothing was tuned for layer double:{i}": 9 - i for i in range(5)}
    text = run_report(replace(finished.run.summary, untuned=untuned), SETTINGS).text()
    lines = [line for line in text.splitlines() if "in place of params" in line]
    assert lines[0] == "9 calls used the widgets in place of params: nothing was tuned for layer double:0"
    assert len(lines) == 3


@pytest.mark.parametrize("tuned_for, chosen, says", (
    (0, 3, "params were tuned without refreshes"), (4, 2, "tuned for 4 refreshes, the node has 2"),
    (4, 2, "further from dense"), (2, 4, "closer to dense"), (4, 4, ""), (0, 0, "")))
def test_other_refreshes_than_tuned_for_are_said(finished, tuned_for, chosen, says):
    tuned = TunedParams(Architecture("WanModel", {}), Bounds(), refreshes=tuned_for)
    text = run_report(finished.run.summary, replace(SETTINGS, tuned=tuned, refreshes=chosen)).text()
    assert (says in text) if says else ("were tuned" not in text)
    assert (f"between {tuned_for} refreshes" in text) == (tuned_for > 0)

"""What fails at the end of a run, or in a call, and that it costs nothing else."""
import logging
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from comfyui_spargeattn.nodes.run import kernel_calls
from comfyui_spargeattn.tests.nodes.stand_ins import Patcher

PARAMS = SpargeParams(topk=0.5, similarity_threshold=-1.0)


def fail(*args, **kwargs):
    raise RuntimeError("injected")


def sample(override, *bodies, tokens=128):
    """A run with a step for each of the bodies, called after the attention of the step."""
    patcher, options = Patcher(), {SLOT: override, "block_index": 0}
    override.on_pre_run(patcher)
    try:
        for body in bodies or (lambda: None,):
            override.on_prepare_state(patcher, torch.ones(1), {"transformer_options": options})
            x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(0))
            override(lambda q, *args, **kwargs: q, x, x, x, 2, transformer_options=options)
            body()
    finally:
        override.on_cleanup(patcher)


def comparable(summary):
    """What is the same in two equal runs."""
    times = [(times.calls, times.dense is None) for times in summary.times]
    return replace(summary, seconds=0.0, ended=0.0, times=times, maps=None), summary.maps.maps.keys()


# Where the end of a run can fail: reading statistics, times and maps, counting, closing, and telling.
STAGES = {
    "statistics": ("comfyui_spargeattn.nodes.run.summary._read", True),
    "times": ("comfyui_spargeattn.nodes.run.stopwatch.Stopwatch.milliseconds", True),
    "maps": ("comfyui_spargeattn.nodes.run.block_maps.BlockPictures.fetch", True),
    "counts": ("comfyui_spargeattn.nodes.run.summary.RunSummary.of", False),
    "end": ("comfyui_spargeattn.nodes.run.state.RunState._summarise", False),
    "line": ("comfyui_spargeattn.nodes.run.summary.RunSummary.__str__", None),
    "advice": ("comfyui_spargeattn.nodes.override.about_little_skipped", None),
}


@pytest.mark.parametrize("stage", STAGES)
def test_failing_books_cost_no_run(stage, monkeypatch, caplog):
    target, counted = STAGES[stage]
    settings = NodeSettings(PARAMS, start_percent=0.0, min_tokens=64)
    override, fresh = SpargeOverride(settings), SpargeOverride(settings)
    sample(override)
    earlier = override.run.summary
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(target, fail)
        sample(override, *[lambda: None] * 3)
    assert "the numbers of this run could not be read" in caplog.text and "injected" in caplog.text
    assert not override.run.running and override.run.summary is not earlier
    if counted is not None:
        assert (override.run.summary is not None) == counted
    if counted:
        assert (override.run.summary.sparse, override.run.summary.sparsity) == (3, None)
        assert "could not be read" in override.run.summary.unread
    for one in (override, fresh):
        sample(one, *[lambda: None] * 2)
    assert comparable(override.run.summary) == comparable(fresh.run.summary)


@pytest.mark.parametrize("stage", STAGES)
def test_failing_books_hide_no_error(stage, monkeypatch):
    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, min_tokens=64))

    def interrupt():
        raise KeyboardInterrupt("of the user")

    monkeypatch.setattr(STAGES[stage][0], fail)
    with pytest.raises(KeyboardInterrupt, match="of the user"):
        sample(override, interrupt)
    assert not override.run.running


def test_user_who_stops_the_program_while_numbers_are_read_stops_it(monkeypatch):
    def stop(values):
        raise KeyboardInterrupt

    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, min_tokens=64))
    monkeypatch.setattr("comfyui_spargeattn.nodes.run.summary._read", stop)
    with pytest.raises(KeyboardInterrupt):
        sample(override)
    assert not override.run.running


def test_failing_sparse_call_ends_its_run_alone(monkeypatch):
    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, min_tokens=64))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="injected"):
        sample(override, lambda: patch.setattr(kernel_calls, "sparge_attention", fail), lambda: None)
    summary = override.run.summary
    assert (summary.steps, summary.sparse, summary.unread) == (2, 1, "the run was interrupted")
    sample(override)
    assert (override.run.summary.steps, override.run.summary.sparse) == (1, 1) and not override.run.summary.unread

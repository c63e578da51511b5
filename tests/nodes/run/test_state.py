"""What a run collects, how it ends, and that nothing of it is left for the next."""
import logging
import weakref
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, SpargeStats, block_map
from comfyui_spargeattn.nodes import override as override_module
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.plan import Dense, NodeSettings
from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from comfyui_spargeattn.nodes.run.block_maps import MapRequest
from comfyui_spargeattn.nodes.run.sigma_window import SigmaWindow
from comfyui_spargeattn.nodes.run.state import RunState
from comfyui_spargeattn.nodes.run.stopwatch import Stopwatch
from comfyui_spargeattn.nodes.run.summary import CallTimes

PARAMS = SpargeParams(topk=0.5, similarity_threshold=-1.0)


class Timed(Stopwatch):
    """A stopwatch that shows a given time."""

    def __init__(self, shown):
        super().__init__(torch.device("cpu"))
        self.shown = shown

    def milliseconds(self):
        return self.shown


def state():
    return RunState(SigmaWindow(0.0, 1.0))


def step(run):
    run.next_step(torch.ones(1), lambda percent: 1 - percent, None)


def attention(tokens=128, heads=2, batch=1, dtype=torch.float32, mask=None):
    q = torch.zeros(batch, heads, tokens, 8, dtype=dtype)
    return AttentionCall(q, q, q, "BHND", mask=mask)


def sparse(run, kept=0.5, block=0, milliseconds=1.0, **shape):
    call = attention(**shape)
    stats = SpargeStats(torch.full((call.batch, 2), kept), torch.zeros(call.batch, 2))
    return run.add_call(call, block if block is None else TransformerBlock("", block), Timed(milliseconds), stats)


def dense(run, block=0, milliseconds=1.0, **shape):
    block = None if block is None else TransformerBlock("", block)
    return run.add_call(attention(**shape), block, Timed(milliseconds))


def fail(*args, **kwargs):
    raise RuntimeError("injected")


def run_within_a_handler(run, body):
    """A run that a handler of somebody else's error starts."""
    try:
        raise KeyError("of somebody else")
    except KeyError:
        run.begin()
        step(run)
        sparse(run)
        try:
            body()
        finally:
            run.end()


def survive():
    try:
        fail()
    except RuntimeError:
        pass


@pytest.mark.parametrize("body", (lambda: None, survive))
def test_run_begun_while_an_error_is_handled_is_complete(body):
    run = state()
    run_within_a_handler(run, body)
    assert run.summary.sparsity == 0.5 and not run.summary.unread


def test_run_that_fails_there_is_interrupted():
    run = state()
    with pytest.raises(RuntimeError, match="injected"):
        run_within_a_handler(run, fail)
    assert run.summary.sparsity is None and run.summary.unread == "the run was interrupted"


def test_counters_of_a_step():
    run = state()
    run.begin()
    for timestep in (torch.ones(1), torch.ones(1)):
        for _ in range(2):  # two conditions of one evaluation: the same tensor again
            run.next_step(timestep, lambda percent: 1 - percent, None)
            sparse(run, block=None)
            dense(run, block=None)
    summary = run.end()
    rows = {(row.index, at) for row, at in summary.cells}
    assert summary.steps == 2 and rows == {(index, at) for index in range(4) for at in (1, 2)}
    assert {at: summary.cells[TransformerBlock("call", 1), at] for at in (1, 2)} == {1: None, 2: None}
    assert summary.by_step == {1: 0.5, 2: 0.5} and not summary.by_block


def test_maps_of_a_short_run_are_of_every_nth_block_and_of_its_first_call():
    """A block may be called twice in a step."""
    run = state()
    run.begin()
    run.next_step(torch.ones(1), lambda percent: 1 - percent, torch.linspace(1, 0, 4))  # three steps
    wanted = []
    for block in (*range(12), *range(12)):
        row = sparse(run, block=block)
        if row is not None:
            run.add_map(row, torch.full((2, 4, 4), len(wanted) < 2))
            wanted.append(row.index)
    maps = run.end().maps.maps
    assert wanted[:2] == [0, 6] and not {0, 6} & set(wanted[2:])
    assert all(maps[TransformerBlock("", index)].all() for index in (0, 6))


def test_times_are_medians_of_one_shape():
    """The first call of a shape may contain the compilation of its kernels."""
    run = state()
    run.begin()
    step(run)
    for milliseconds in (900.0, 2.0, 4.0):
        sparse(run, milliseconds=milliseconds)
    for milliseconds in (700.0, 6.0, 8.0, 7.0):
        dense(run, milliseconds=milliseconds)
    for times, shape in ((30.0, {"tokens": 256}), (40.0, {"batch": 2}), (50.0, {"dtype": torch.float16}),
                         (60.0, {"heads": 4}), (70.0, {"mask": torch.ones(1, 1, 1, 128, dtype=torch.bool)})):
        sparse(run, milliseconds=times, **shape)
        dense(run, milliseconds=2 * times, **shape)
    assert set(run.end().times) == {CallTimes(3, 4.0, 7.5), *(CallTimes(1, x, 2 * x) for x in (30, 40, 50, 60, 70))}


def test_share_of_a_run_counts_long_calls_more_and_dense_calls_as_nothing():
    run = state()
    run.begin()
    step(run)
    sparse(run, kept=0.25, tokens=256)  # four times the work of the others
    sparse(run, kept=1.0)
    dense(run, tokens=256)
    dense(run)
    summary = run.end()
    assert summary.sparsity == 0.375 and summary.skipped == pytest.approx(4 * 0.75 / 10)


def test_products_with_v_are_half_of_the_work():
    run = state()
    run.begin()
    step(run)
    run.add_call(attention(), None, Timed(1.0), SpargeStats(torch.full((1, 2), 0.75), torch.full((1, 2), 0.5)))
    assert run.end().skipped == pytest.approx(0.25 + 0.75 * 0.5 / 2)


@pytest.mark.parametrize("ended", (True, False))
def test_nothing_of_a_run_is_in_the_next(ended, caplog):
    """Also where the first was never closed."""
    def first(run):
        run.begin()
        step(run)
        step(run)
        row = sparse(run, kept=0.25, tokens=256, milliseconds=5.0)
        run.add_map(row, torch.ones(2, 4, 4, dtype=torch.bool))
        run.add_dense(Dense("unsupported dtype", "q is odd"))
        run.add_dense(Dense("fewer tokens than min_tokens", "1 < 2"))
        run.say_once("a", "said in every run")

    def second(run):
        run.begin()
        step(run)
        dense(run)
        run.add_dense(Dense("fewer tokens than min_tokens", "3 < 4"))
        run.say_once("a", "said in every run")
        sparse(run, milliseconds=2.0)
        return replace(run.end(), seconds=0.0, ended=0.0)

    used = state()
    first(used)
    if ended:
        used.end()
    with caplog.at_level(logging.INFO):
        summary, expected = second(used), second(state())
    assert summary == expected and expected.details == {"fewer tokens than min_tokens": "3 < 4"}
    assert [times.sparse for times in summary.times] == [2.0]
    assert caplog.text.count("said in every run") == 2


def test_window_closes_with_the_run():
    """A call outside a run, where nothing tells the noise level, stays dense."""
    run = RunState(SigmaWindow(0.0, 0.9))
    run.begin()
    run.next_step(torch.ones(1), lambda percent: 1 - percent, None)
    assert run.window.inside
    run.end()
    assert not run.window.inside


def test_tensors_of_a_run_go_with_it():
    for fail in (False, True):
        run = state()
        run.begin()
        step(run)
        stats = SpargeStats(torch.ones(1, 2), torch.zeros(1, 2))
        run.add_call(attention(), None, Timed(1.0), stats)
        held = weakref.ref(stats.kept)
        del stats
        assert held() is not None
        try:
            if fail:
                raise RuntimeError
        except RuntimeError:
            run.end()
        else:
            run.end()
        assert held() is None


def test_calls_outside_a_run_are_not_counted():
    run = state()
    assert sparse(run) is None
    run.add_dense(Dense("fewer tokens than min_tokens"))
    run.begin()
    step(run)
    summary = run.end()
    assert (summary.sparse, summary.dense) == (0, {})


class Patcher:
    @staticmethod
    def get_model_object(name):
        return type("Sampling", (), {"percent_to_sigma": staticmethod(lambda percent: 1 - percent)})


def sample(override, *bodies, tokens=128):
    """A run with a step for each of the bodies, called after the attention of the step."""
    options = {SLOT: override, "block_index": 0}
    override.on_pre_run(Patcher)
    try:
        for body in bodies or (lambda: None,):
            override.on_prepare_state(Patcher, torch.ones(1), {"transformer_options": options})
            x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(0))
            override(lambda q, *args, **kwargs: q, x, x, x, 2, transformer_options=options)
            body()
    finally:
        override.on_cleanup(Patcher)


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
        sample(override, lambda: patch.setattr(override_module, "sparge_attention", fail), lambda: None)
    summary = override.run.summary
    assert (summary.steps, summary.sparse, summary.unread) == (2, 1, "the run was interrupted")
    sample(override)
    assert (override.run.summary.steps, override.run.summary.sparse) == (1, 1) and not override.run.summary.unread


@pytest.mark.parametrize("layout", ("BNHD", "BHND"))
def test_kept_map_is_of_the_call_with_its_padding(layout):
    """Two samples with other padding: the map is the first one's."""
    params = SpargeParams(topk=0.25, similarity_threshold=-1.0)
    override = SpargeOverride(NodeSettings(params, start_percent=0.0, min_tokens=64))
    q, k = torch.randn(2, 2, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 512, dtype=torch.bool)
    visible[0, 100:300] = False
    visible[1, 300:] = False
    options = {SLOT: override, "block_index": 0}
    override.run.map_request = MapRequest(1, TransformerBlock("", 0))
    override.on_pre_run(Patcher)
    override.on_prepare_state(Patcher, torch.ones(1), {"transformer_options": options})
    how = {"skip_reshape": True, "skip_output_reshape": True} if layout == "BHND" else {}
    given = [x if layout == "BHND" else x.transpose(1, 2).flatten(2) for x in (q, k, k)]
    override(None, *given, 2, visible[:, None, None], scale=0.3, transformer_options=options, **how)
    override.on_cleanup(Patcher)
    kept = override.run.summary.maps.maps[TransformerBlock("", 0)].bool()

    def expected(padding):
        return block_map(q[:1], k[:1], params=params, scale=0.3, key_padding_mask=padding, impl="reference").mask()[0]

    assert torch.equal(kept, expected(~visible[:1])) and not torch.equal(kept, expected(None))
    assert not kept[:, :, 2:4].any()  # keys 128 to 255 are padding

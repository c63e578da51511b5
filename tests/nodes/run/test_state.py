"""What a run collects, how it ends, and that nothing of it is left for the next."""
import logging
import weakref
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeStats
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.plan import Dense
from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock
from comfyui_spargeattn.nodes.run.sigma_window import SigmaWindow
from comfyui_spargeattn.nodes.run.state import EVERY, FIRST, RunState
from comfyui_spargeattn.nodes.run.stopwatch import Stopwatch
from comfyui_spargeattn.nodes.run.summary import CallTimes


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
    run.next_step(torch.ones(1), lambda percent: 1 - percent, torch.linspace(1, 0, 12))  # eleven steps
    wanted = []
    for block in (*range(12), *range(12)):
        row = sparse(run, block=block)
        if row is not None:
            run.add_map(row, torch.full((2, 4, 4), len(wanted) < 2))
            wanted.append(row.index)
    maps = run.end().maps.maps
    assert wanted[:2] == [0, 6] and not {0, 6} & set(wanted[2:])
    assert all(maps[TransformerBlock("", index)].all() for index in (0, 6))


@pytest.mark.parametrize("dense", (False, True))
@pytest.mark.parametrize("layers", (1, 7, 8, 9, 40, 57, 64))
def test_of_many_calls_an_eighth_is_timed_in_all_layers(layers, dense):
    run, timed = state(), {}
    run.begin()
    for step in range(50):
        for layer in range(layers):
            timed[step, layer] = run.watch(attention(), dense).stop().milliseconds() is not None
    few = list(timed.values())[FIRST:]
    assert all(list(timed.values())[:FIRST])
    for other in (attention(heads=4), dense), (attention(), not dense):
        assert run.watch(*other).stop().milliseconds() is not None
    assert not few or abs(sum(few) - len(few) / EVERY) <= 1 + 0.02 * len(few)
    assert {layer for (step, layer), watched in timed.items() if watched and step >= 5} == set(range(layers))


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

"""Thresholds of calls with and without a residual, as they reach the kernels."""
from dataclasses import replace

import pytest

from comfyui_spargeattn.kernels import SpargeParams, attention_residual, sparge_attention
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.run import kernel_calls
from comfyui_spargeattn.nodes.run.host_memory import Memory
from comfyui_spargeattn.nodes.run.residuals import ResidualStore
from comfyui_spargeattn.tests.nodes.stand_ins import attend, sample

SETTINGS = NodeSettings(SpargeParams(topk=0.25), start_percent=0.0, min_tokens=64, refreshes=2)


@pytest.fixture
def reached(monkeypatch):
    """(selection, amount, whether there is a residual) of the sparse calls."""
    calls = []

    def record(q, k, v, *, params, residual=None, **how):
        calls.append((params.selection, params.amount, residual is not None))
        return sparge_attention(q, k, v, params=params, residual=residual, **how)

    monkeypatch.setattr(kernel_calls, "sparge_attention", record)
    return calls


@pytest.fixture
def made(monkeypatch):
    """The amounts that residuals were made with."""
    amounts = []
    monkeypatch.setattr(kernel_calls, "attention_residual", lambda *args, params, **how: (
        amounts.append(params.amount), attention_residual(*args, params=params, **how))[1])
    return amounts


def run(settings, recognised=True, steps=16, memory=1 << 30):
    override = SpargeOverride(settings, memory=Memory(lambda device: memory))

    def evaluate(options):
        known = {"uuids": ["a condition"]} if recognised else {}
        override.names.count(lambda x, t, concat, crossattn, control, inner, **conditions: attend(inner), None, None,
                             transformer_options=options | known)

    sample(override, evaluate, steps=steps)


def test_what_counts_on_a_residual_has_one(reached):
    run(SETTINGS)
    assert len(reached) == 14 and set(reached) == {("topk", 0.25, True)}


@pytest.mark.parametrize("params", (SpargeParams(cdf_threshold=0.5), SpargeParams(topk=0.1)), ids=("cdf", "topk"))
def test_refreshes_keep_what_was_chosen(reached, made, params):
    """A residual fits the thresholds that it was made with."""
    run(replace(SETTINGS, params=params))
    assert len(reached) == 14 and set(reached) == {(params.selection, params.amount, True)}
    assert made == 2 * [params.amount]


@pytest.mark.parametrize("how", (dict(recognised=False), dict(steps=11), dict(memory=0)),
                         ids=("not recognised", "few steps", "no memory"))
def test_without_a_residual_more_is_kept(reached, how, caplog):
    with caplog.at_level("INFO"):
        run(SETTINGS, **how)
    assert len(reached) >= 4 and set(reached) == {("cdf", 0.99, False)}
    assert caplog.text.count("calls without a residual keep at least 99% of the attention") == 1


@pytest.mark.parametrize("stage", ("get", "admits", "put"))
def test_a_lost_residual_ends_no_run(reached, monkeypatch, caplog, stage):
    def fails(*args):
        raise RuntimeError("no more pages to pin")

    monkeypatch.setattr(ResidualStore, stage, fails)
    with caplog.at_level("INFO"):
        run(SETTINGS)
    assert set(reached) == {("cdf", 0.99, False)}
    assert caplog.text.count("a residual was lost: RuntimeError: no more pages to pin") == 1


@pytest.mark.parametrize("stage, says", (("count", "a residual was lost: RuntimeError: no driver"),
                                         ("decide", "the memory of residuals is not known: RuntimeError: no driver")))
def test_what_can_not_be_counted_is_kept_as_it_comes(reached, monkeypatch, caplog, stage, says):
    def fails(*args):
        raise RuntimeError("no driver")

    monkeypatch.setattr(ResidualStore, stage, fails)
    with caplog.at_level("INFO"):
        run(replace(SETTINGS, start_percent=0.3), steps=24)
    assert set(reached) == {("topk", 0.25, True)} and caplog.text.count(says) == 1


def test_an_error_of_the_device_is_not_hidden(monkeypatch):
    def fails(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ResidualStore, "get", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(SETTINGS)


def test_without_refreshes_thresholds_are_as_chosen(reached):
    run(replace(SETTINGS, refreshes=0))
    assert len(reached) == 16 and set(reached) == {("topk", 0.25, False)}

"""What of a call, of the widgets and of tuned parameters reaches the kernels, read off the kernels' own arguments."""
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.hilbert import permutation as orders
from comfyui_spargeattn.hilbert import sequence_order
from comfyui_spargeattn.kernels import FastPathError, SpargeParams, SpargeStats
from comfyui_spargeattn.nodes.call import plan as policy
from comfyui_spargeattn.nodes.call.layer_names import LayerNames
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.call.token_layout import KEY, Expectation
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from comfyui_spargeattn.nodes.run import kernel_calls
from comfyui_spargeattn.nodes.tuned.candidates import TunedSetting
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch
from comfyui_spargeattn.tests.nodes.stand_ins import Container, attend, sample

TEXT, GRID = 20, (2, 6, 9)
TOKENS = TEXT + math.prod(GRID)
PARAMS = SpargeParams(topk=0.25, similarity_threshold=-1.0, pv_threshold=12.0)
SETTINGS = NodeSettings(PARAMS, start_percent=0.0, min_tokens=64)
WITH_TEXT_FIRST = {KEY: Expectation(GRID, before=TEXT)}


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the calls that reach the kernels, which give zeros: (q, k, v, keywords) of each."""
    calls = []

    def kernels(q, k, v, **kwargs):
        calls.append((q, k, v, kwargs))
        return torch.zeros_like(q), SpargeStats(*torch.ones(2, q.shape[0], q.shape[2]))

    monkeypatch.setattr(kernel_calls, "sparge_attention", kernels)
    return calls


def go(launched, settings=SETTINGS, options=None, heads=2, **kwargs):
    """Keywords of the kernels for one call with these settings."""
    q, k, v = torch.randn(3, 2, TOKENS, heads * 8, generator=torch.Generator().manual_seed(0))
    out = SpargeOverride(settings)(None, q, k, v, heads, transformer_options=options or {}, **kwargs)
    assert out.shape == q.shape and not out.any()
    [(*given, keywords)] = launched
    assert all(torch.equal(x.flatten(2), y) for x, y in zip(given, (q, k, v), strict=True))
    return keywords


def tuned(curves=("row-major", "row-major"), skipped="drop", pv_dtype="fp16", layer="#1"):
    """Settings whose parameters know one layer of two heads."""
    params = SpargeParams(topk=torch.tensor([0.2, 0.7]), similarity_threshold=torch.tensor([-1.0, 0.3]))
    search = replace(LayerSearch.start(2, 2), setting=TunedSetting(params, curves, skipped, pv_dtype))
    known = TunedParams(Architecture("Wan", {}), Bounds(), MappingProxyType({layer: TunedLayer(search, 8)}))
    return replace(SETTINGS, tuned=known), params


def in_evaluation(options=None):
    """The options with which a model's calls come inside an evaluation."""
    seen = []
    LayerNames().count(lambda x, t, a, b, c, inner, **conds: seen.append(inner), None, None,
                       transformer_options=options or {})
    return seen[0]


def test_widgets(launched):
    given = go(launched, replace(SETTINGS, skipped="pooled", pv_dtype="fp16"))
    assert given["params"] is PARAMS and given["return_stats"] is True
    assert (given["skipped"], given["pv_dtype"], given["impl"]) == ("pooled", "fp16", "reference")
    assert given["order"] is None and given["sink_keys"] == () and given["scale"] is None
    assert given["layout"] == "BNHD" and not given.keys() & {"key_padding_mask", "key_bias"}


@pytest.mark.parametrize("scale", (0.3, 2))
def test_scale(launched, scale):
    assert go(launched, scale=scale)["scale"] == scale


def test_implementation_that_was_chosen(launched, monkeypatch):
    monkeypatch.setattr(policy, "select_implementation", lambda q: ("triton", None))
    assert go(launched)["impl"] == "triton"


def test_order_and_sinks(launched):
    given = go(launched, replace(SETTINGS, hilbert="on"), WITH_TEXT_FIRST)
    expected = torch.cat([sequence_order(GRID) + TEXT, torch.arange(TEXT, dtype=torch.int32)])
    assert torch.equal(given["order"], expected) and given["sink_keys"] == ((0, TEXT),)
    assert given["dense_queries"] == ()


def test_no_sinks_in_the_models_own_order(launched):
    given = go(launched, options=WITH_TEXT_FIRST)
    assert given["order"] is None and given["sink_keys"] == ()


@pytest.mark.parametrize("hilbert", ("on", "off"))
def test_tokens_that_stay_exact(launched, hilbert):
    """In any order, as queries and, with all the others outside the grid, as keys."""
    options = {KEY: Expectation(GRID, before=None, exact=True, clips=((4, 7),))}
    given = go(launched, replace(SETTINGS, hilbert=hilbert), options)
    assert given["sink_keys"] == ((0, TEXT),) and given["dense_queries"] == ((0, 4), (7, TEXT))


@pytest.mark.parametrize("shape", ((2, 1, 1, TOKENS), (1, 1, TOKENS), (1, TOKENS)))
def test_padding(launched, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    given = go(launched, mask=mask)
    assert torch.equal(given["key_padding_mask"], ~mask.reshape(-1, TOKENS).expand(2, -1)) and "key_bias" not in given


@pytest.mark.parametrize("shape", ((2, 1, 1, TOKENS), (2, 1, TOKENS), (1, 1, TOKENS)))
def test_bias(launched, shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = go(launched, mask=bias)
    assert torch.equal(given["key_bias"], bias.reshape(-1, TOKENS).expand(2, -1)) and "key_padding_mask" not in given


def test_tuned_setting(launched):
    settings, params = tuned(("hilbert", "time-major"), "pooled")
    given = go(launched, settings, in_evaluation(WITH_TEXT_FIRST))
    assert torch.equal(given["params"].topk, params.topk)
    assert torch.equal(given["params"].similarity_threshold, params.similarity_threshold)
    assert (given["skipped"], given["pv_dtype"]) == ("pooled", "fp16")
    rows = [sequence_order(GRID, before=TEXT, curve=curve) for curve in ("hilbert", "time-major")]
    assert torch.equal(given["order"], torch.stack(rows)) and given["sink_keys"] == ((0, TEXT),)


def test_tuned_int8_is_left_to_the_card(launched, monkeypatch):
    monkeypatch.setattr(policy, "select_implementation", lambda q: ("triton", None))
    assert go(launched, tuned(pv_dtype="int8")[0], in_evaluation())["pv_dtype"] == "auto"


def test_cross_attention_is_no_layer(launched):
    """It must not push the self-attention behind it to another name."""
    override, options = SpargeOverride(tuned()[0]), in_evaluation()
    q, text = torch.zeros(1, TOKENS, 16), torch.zeros(1, 12, 16)
    override(lambda *args, **kwargs: q, q, text, text, 2, transformer_options=options)
    override(None, q, q, q, 2, transformer_options=options)
    [(*_, given)] = launched
    assert isinstance(given["params"].topk, torch.Tensor)


def evaluate(override, options=None, calls=1):
    """An evaluation of a model that makes these calls, as ComfyUI runs it with this override on the model."""
    q = torch.zeros(1, TOKENS, 16)

    def model(x, t, c_concat, c_crossattn, control, inner, **conds):
        for _ in range(calls):
            override(lambda q, *args, **kwargs: q, q, q, q, 2, transformer_options=inner)

    override.names.count(model, None, None, transformer_options=options)


def is_tuned(launched):
    """Of each call that reached the kernels; starts anew."""
    found = [isinstance(given["params"].topk, torch.Tensor) for *_, given in launched]
    launched.clear()
    return found


def test_two_overrides_in_a_chain_count_a_call_once(launched):
    inner = SpargeOverride(tuned(layer="#2")[0])
    evaluate(SpargeOverride(replace(SETTINGS, min_tokens=100_000), inner), calls=3)
    assert is_tuned(launched) == [False, True, False]


def test_layers_in_doubt_use_the_widgets(launched, caplog):
    override = SpargeOverride(tuned(layer="#1")[0])
    skips = {"patches_replace": {"dit": {("double_block", 0): None}}}
    for run in range(2):  # a run starts without what an earlier one learnt
        caplog.clear()
        override.on_pre_run(None)
        with caplog.at_level("INFO"):
            for _ in range(2):
                evaluate(override, calls=2)
                evaluate(override, skips, calls=2 if run == 0 else 1)
        assert is_tuned(launched) == ([True, False, False, False] + [True, False] * 2 if run == 0 else
                                      [True, False, False] * 2)
        assert sum("thresholds of the widgets: this evaluation may leave layers out" in line
                   for line in caplog.messages) == 1
        override.on_cleanup(None)


def test_map_of_a_report(launched, monkeypatch):
    """It is asked for with the arguments of the call, for the first of the batch."""
    asked = []

    def block_map(q, k, **kwargs):
        asked.append((q, k, kwargs))
        return SimpleNamespace(mask=lambda: torch.ones(1, 2, 3, 3, dtype=torch.bool))

    monkeypatch.setattr(kernel_calls, "block_map", block_map)
    override = SpargeOverride(replace(SETTINGS, hilbert="on"))
    q, k = torch.randn(2, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1))
    for given in (mask, mask > 0.5):
        override.on_pre_run(None)
        override.run.next_step(torch.ones(1), None, None)
        override(None, q, k, k, 2, given, scale=0.2, transformer_options=dict(WITH_TEXT_FIRST))
        override.on_cleanup(None)
    for (*_, sparse), (first_q, first_k, how), name in zip(launched, asked, ("key_bias", "key_padding_mask"),
                                                           strict=True):
        assert torch.equal(first_q.flatten(2), q[:1]) and torch.equal(first_k.flatten(2), k[:1])
        assert torch.equal(how.pop(name), sparse[name][:1])
        assert how == {key: sparse[key] for key in how} and how["scale"] == 0.2 and how["sink_keys"] == ((0, TEXT),)
        assert how.keys() == sparse.keys() - {"skipped", "return_stats", "residual", "overwrite_v", name}


def failing(kind, text, monkeypatch, name="sparge_attention"):
    """Kernels that raise while they hold a tensor; returns weak references to the tensors held."""
    held = []

    def kernels(q, *args, **kwargs):
        scratch = torch.zeros_like(q)
        held.append(weakref.ref(scratch))
        raise kind(text)

    monkeypatch.setattr(kernel_calls, name, kernels)
    return held


@pytest.mark.parametrize("kind, text, reason, detail", (
    (FastPathError, "no C compiler was found; install gcc", "fast kernels failed",
     "no C compiler was found; install gcc"),
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB.", "out of memory", "128 tokens"),
))
def test_failed_calls_go_dense(monkeypatch, caplog, kind, text, reason, detail):
    """After all that the failed call held is free, with one line in the log and the reason on the node."""
    held, alive, shown = failing(kind, text, monkeypatch), [], []
    override = SpargeOverride(SETTINGS, show=shown.append)

    def backend(q, *args, **kwargs):
        alive.extend(ref() is not None for ref in held)
        return q

    with caplog.at_level("INFO"):
        for _ in range(2):
            sample(override, lambda options: attend(options, func=backend), steps=3)
            assert override.run.summary.dense == {reason: 3} and override.run.summary.details == {reason: detail}
    assert shown[0] == f"step 1 · nothing sparse yet: {reason} ({detail})"
    assert shown[-1] == f"nothing sparse: {reason} ({detail})"
    lines = [line for line in caplog.messages if f"dense attention: {reason}" in line]
    assert len(lines) == 2 and alive and not any(alive)


def test_tensors_in_containers_may_be_overwritten(launched):
    """They are freed where ComfyUI's record of the evaluation sees it."""
    given, full = [], []

    @contextmanager
    def unrecorded():
        yield
        full.extend(container.tensor is not None for container in given)

    override = SpargeOverride(SETTINGS, unrecorded=unrecorded)
    x = torch.ones(1, TOKENS, 16)
    override(None, x, x, x, 2, transformer_options={})
    given += [Container(x.clone()) for _ in range(3)]
    gone = [weakref.ref(container.tensor) for container in given]
    override(None, *given, 2, transformer_options={})
    assert [keywords["overwrite_v"] for *_, keywords in launched] == [False, True]
    launched.clear()
    assert len(full) > 2 and all(full)
    assert not any(container.tensor is not None for container in given) and not any(ref() is not None for ref in gone)


def test_a_call_whose_values_are_lost_ends_the_run(monkeypatch):
    failing(RuntimeError, "attention failed after it had overwritten some of v", monkeypatch)
    with pytest.raises(RuntimeError, match="overwritten some of v"):
        attend({SLOT: SpargeOverride(SETTINGS)})


def test_errors_of_the_device_end_the_run(monkeypatch):
    failing(RuntimeError, "CUDA error: an illegal memory access was encountered", monkeypatch)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        attend({SLOT: SpargeOverride(SETTINGS)})


@pytest.mark.parametrize("kind", (FastPathError, torch.OutOfMemoryError))
def test_a_map_that_fails_costs_the_report_alone(launched, monkeypatch, kind):
    failing(kind, "", monkeypatch, "block_map")
    override = SpargeOverride(SETTINGS)
    sample(override, attend, steps=2)
    assert override.run.summary.sparse == 2 and override.run.summary.dense == {}


def test_nothing_stays_on_the_device_after_a_run():
    """Orders are copied to a device once a run."""
    override = SpargeOverride(SETTINGS)

    def on_device():
        return [order for order in orders._cache._entries.values() if order.device.type != "cpu"]

    def evaluate(options):
        sequence_order(GRID, device="meta")
        assert on_device()

    sample(override, evaluate, steps=2)
    assert not on_device() and orders._cache.elements

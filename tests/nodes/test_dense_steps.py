"""What computes the steps in which attention is dense: the kernels over all blocks, or the model's own attention."""
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError, SpargeParams, sparge_attention
from comfyui_spargeattn.nodes.call.plan import STRICT, NodeSettings, SparsePlan
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report.page import THEMES, draw_report
from comfyui_spargeattn.nodes.report.panels import run_report
from comfyui_spargeattn.nodes.run import kernel_calls
from comfyui_spargeattn.nodes.run.host_memory import Memory
from comfyui_spargeattn.nodes.run.state import ENOUGH
from comfyui_spargeattn.tests.nodes.stand_ins import Container, attend, sample

TOPK, CDF = SpargeParams(topk=0.25), SpargeParams(cdf_threshold=0.5, similarity_threshold=-1.0, pv_threshold=3.0)
SETTINGS = NodeSettings(TOPK, start_percent=0.5, min_tokens=64, skipped="pooled", pv_dtype="fp16", hilbert="on")
OUTSIDE, REFRESH = "outside start_percent … end_percent", "refresh of the residuals"


@pytest.fixture
def kernels(monkeypatch):
    """Arguments of the calls that reach the kernels, which the plans here take for fast ones."""
    monkeypatch.setattr(SparsePlan, "fast", True)
    calls = []

    def record(q, k, v, **how):
        calls.append(how)
        return sparge_attention(q, k, v, **how)

    monkeypatch.setattr(kernel_calls, "sparge_attention", record)
    return calls


def over_all_blocks(kernels):
    return [how for how in kernels if not how["return_stats"]]


@pytest.mark.parametrize("params", (TOPK, CDF), ids=("topk", "cdf"))
def test_calls_outside_the_window(kernels, params):
    override, backend = SpargeOverride(replace(SETTINGS, params=params)), []
    sample(override, lambda options: backend.extend(attend(options)))
    summary = override.run.summary
    assert len(backend) == ENOUGH and summary.dense == {OUTSIDE: ENOUGH}
    assert summary.quantised == {OUTSIDE: 5 - ENOUGH} and summary.sparse == 5
    for how in over_all_blocks(kernels):
        assert how["params"].selection == params.selection and how["params"].amount == 1.0
        assert how["params"].pv_threshold == float("inf") and how["pv_dtype"] == "fp16"
        assert how["skipped"] == "drop" and how["order"] is None
    assert len(over_all_blocks(kernels)) == 5 - ENOUGH


@pytest.mark.parametrize("params", (TOPK, CDF), ids=("topk", "cdf"))
def test_strict(kernels, params):
    """Nearly all of the attention, whatever the sparse steps keep; what is skipped is told and counted."""
    override = SpargeOverride(replace(SETTINGS, params=params, skipped="drop", dense_steps="strict", hilbert="off"))
    x = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(0)).cumsum(1)  # neighbours are alike
    sample(override, lambda options: options["optimized_attention_override"](
        lambda q, *args, **kwargs: q, x, x, x, 2, transformer_options=options))
    summary, strict = override.run.summary, [how for how in kernels if how["skipped"] == "pooled"]
    assert summary.quantised == {OUTSIDE: 5 - ENOUGH} and len(strict) == 5 - ENOUGH and summary.sparse == 5
    for how in strict:
        assert how["params"].selection == "cdf" and how["params"].amount == STRICT
        assert how["params"].similarity_threshold == params.similarity_threshold and how["pv_dtype"] == "fp16"
    assert 0 < summary.quantised_sparsity < 1
    computed = 5 * (1 - summary.sparsity) * (1 - summary.pv_skipped / 2) + 2 * (1 - summary.quantised_sparsity)
    assert summary.skipped == pytest.approx(1 - (computed + 3) / 10, abs=0.02)
    assert f"2 quantised over nearly all blocks ({summary.quantised_sparsity:.1%} skipped): 2 {OUTSIDE}" in str(summary)
    assert summary.cells[TransformerBlock("", 0), 5] == pytest.approx(summary.quantised_sparsity)


def test_result_is_dense_attention(kernels):
    override = SpargeOverride(SETTINGS)
    x = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 1, 128, generator=torch.Generator().manual_seed(1))
    found = []
    sample(override, lambda options: found.append(
        options["optimized_attention_override"](lambda q, *args, **kwargs: q, x, x, x, 2, mask, scale=0.3,
                                                transformer_options=options)))
    heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, scale=0.3)
    expected = expected.transpose(1, 2).reshape(x.shape)
    error = (found[ENOUGH] - expected).abs().mean() / expected.abs().mean()
    assert torch.equal(found[0], x) and error < 0.01  # float16 P·V, which the reference emulates
    assert (found[-1] - expected).abs().mean() > 5 * (found[ENOUGH] - expected).abs().mean()


@pytest.mark.parametrize("settings, previous", (
    (replace(SETTINGS, dense_steps="model"), None),
    (replace(SETTINGS, dense_blocks=ListedBlocks.parse("0")), None),
    (replace(SETTINGS, min_tokens=256), None),
    (SETTINGS, lambda func, *args, **kwargs: func(*args, **kwargs)),
), ids=("model", "dense_blocks", "min_tokens", "another override"))
def test_calls_that_keep_the_models_own(kernels, settings, previous):
    override, backend = SpargeOverride(settings, previous), []
    sample(override, lambda options: backend.extend(attend(options)))
    assert override.run.summary.quantised == {} and not over_all_blocks(kernels)
    assert len(backend) == sum(override.run.summary.dense.values()) >= 5


def test_masks_that_differ_by_query_keep_it_too(kernels):
    override = SpargeOverride(SETTINGS)
    sample(override, lambda options: attend(options, mask=torch.zeros(1, 128, 128)))
    assert override.run.summary.dense == {"mask that differs from query to query": 10} and not kernels


def test_the_reference_computes_no_dense_step():
    override = SpargeOverride(SETTINGS)
    sample(override, attend)
    assert override.run.summary.dense == {OUTSIDE: 5} and override.run.summary.quantised == {}


@pytest.mark.parametrize("error, reason", ((FastPathError("no compiler"), "fast kernels failed"),
                                           (torch.OutOfMemoryError("full"), "out of memory")))
def test_kernels_that_fail_leave_the_call_to_the_model(kernels, monkeypatch, error, reason):
    def fail(q, k, v, return_stats, **how):
        if return_stats:
            return sparge_attention(q, k, v, return_stats=True, **how)
        raise error

    monkeypatch.setattr(kernel_calls, "sparge_attention", fail)
    override, backend = SpargeOverride(SETTINGS), []
    sample(override, lambda options: backend.extend(attend(options)))
    assert override.run.summary.dense == {OUTSIDE: ENOUGH, reason: 5 - ENOUGH} and len(backend) == 5
    assert override.run.summary.quantised == {}


@pytest.mark.usefixtures("short_runs_refresh")
def test_refreshes(kernels, monkeypatch):
    """The residual is made of what the kernels computed."""
    made, outs = [], []
    residual = kernel_calls.attention_residual
    monkeypatch.setattr(kernel_calls, "attention_residual", lambda q, k, v, dense, **how: (
        made.append(dense.flatten(2)), residual(q, k, v, dense, **how))[1])
    override = SpargeOverride(replace(SETTINGS, start_percent=0.0, refreshes=4), memory=Memory(lambda device: 1 << 30))
    x = torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(0))

    def evaluate(options):
        refreshing = override.run.refresh.due
        for _ in range(2):  # two layers
            out = override(lambda q, *args, **kwargs: q, x, x, x, 2, transformer_options=options)
            outs.extend([out] if refreshing else [])

    sample(override, lambda options: override.names.count(
        lambda x, t, c_concat, c_crossattn, control, inner, **conds: evaluate(inner), None, None,
        transformer_options=options | {"uuids": ["a"]}))
    summary = override.run.summary
    assert summary.quantised == {REFRESH: 8 - ENOUGH} and summary.dense == {REFRESH: ENOUGH}
    assert f"added to {summary.sparse} sparse calls" in summary.residuals and summary.sparse == 12
    assert len(made) == len(outs) == 8 and all(torch.equal(a, b) for a, b in zip(made, outs))


def test_containers_are_emptied(kernels):
    override, kept = SpargeOverride(SETTINGS), []

    def evaluate(options):
        given = [Container(torch.ones(1, 128, 16)) for _ in range(3)]
        override(attend_containers, *given, 2, transformer_options=options)
        kept.extend(container.tensor for container in given)

    def attend_containers(q, k, v, heads, **kwargs):
        return q if isinstance(q, torch.Tensor) else [x.take() for x in (q, k, v)][0]

    sample(override, evaluate)
    assert override.run.summary.quantised == {OUTSIDE: 5 - ENOUGH} and kept == [None] * 30
    assert len(kernels) == 7 and all(how["overwrite_v"] for how in kernels)


@pytest.mark.usefixtures("short_runs_refresh")
def test_refreshes_leave_containers_whole(kernels):
    """A residual is made of the tensors after dense attention has come from them."""
    override = SpargeOverride(replace(SETTINGS, start_percent=0.0, refreshes=4), memory=Memory(lambda device: 1 << 30))
    refreshing = []

    def evaluate(options):
        for _ in range(2):  # two layers
            refreshing.append(override.run.refresh.due)
            given = [Container(torch.ones(1, 128, 16)) for _ in range(3)]
            override(lambda q, *args, **kwargs: q, *given, 2, transformer_options=options)

    sample(override, lambda options: override.names.count(
        lambda x, t, c_concat, c_crossattn, control, inner, **conds: evaluate(inner), None, None,
        transformer_options=options | {"uuids": ["a"]}))
    assert override.run.summary.quantised == {REFRESH: 8 - ENOUGH} and sum(refreshing) == 8
    assert [not how["return_stats"] for how in kernels] == [not how["overwrite_v"] for how in kernels]


def test_report(kernels, caplog):
    """It counts these calls by themselves, shows them as computed, and compares times with the model's attention."""
    override = SpargeOverride(SETTINGS)
    with caplog.at_level("INFO"):
        sample(override, attend)
    summary = override.run.summary
    block = TransformerBlock("", 0)
    assert [summary.cells[block, step] for step in (1, ENOUGH, ENOUGH + 1, 5)] == [None, None, 0.0, 0.0]
    assert summary.sparsity > 0.3 and summary.skipped == pytest.approx(summary.sparsity / 2)
    assert summary.times[0].calls == 5 and summary.times[0].dense is not None
    assert f"5 attention calls sparse (mean sparsity {summary.sparsity:.1%}), 2 quantised over all blocks: " \
           f"2 {OUTSIDE}, 3 dense: 3 {OUTSIDE}" in caplog.text
    assert sum(f"quantised attention over all blocks: {OUTSIDE}" in line for line in caplog.messages) == 1
    panels = run_report(summary, SETTINGS)
    assert panels.calls == [("sparse", 5), (f"quantised, over all blocks: {OUTSIDE}", 2), (f"dense: {OUTSIDE}", 3)]
    assert "dense_steps quantised" in panels.text()
    theme = THEMES["dark"]
    picture = draw_report(replace(panels, cells={}, block_map=None), theme)
    pixels = {color: count for count, color in picture.getcolors(1 << 20)}
    assert pixels[theme.ramp[0]] > pixels[theme.dense[0]]  # three quarters of 5 calls and 2, against 3


def test_a_run_without_sparse_calls(kernels):
    override = SpargeOverride(replace(SETTINGS, start_percent=1.0, end_percent=1.0))
    sample(override, attend)
    panels = run_report(override.run.summary, SETTINGS)
    assert panels.headline == "Nothing was skipped in this run" and override.run.summary.quantised == {OUTSIDE: 7}
    assert any("dense on purpose" in note for note in panels.notes)

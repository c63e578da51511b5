"""What the override does with the calls of a sampling run, and what it counts, without ComfyUI."""
import copy
import functools
import logging
import threading

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, SpargeStats
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride, describe
from comfyui_spargeattn.nodes.run.sigma_window import SigmaWindow
from comfyui_spargeattn.nodes.run.state import RunState
from comfyui_spargeattn.nodes.run.stopwatch import Stopwatch
from comfyui_spargeattn.tests.nodes.stand_ins import Patcher, attend, sample

PARAMS = SpargeParams(topk=0.5, similarity_threshold=-1.0)
SETTINGS = NodeSettings(PARAMS, start_percent=0.0, min_tokens=64)


def test_run_is_counted(caplog):
    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.3, min_tokens=64, verbose=True))
    with caplog.at_level(logging.INFO):
        sample(override, lambda options: (attend(options), attend(options, tokens=32)), conditions=2)
    summary = override.run.summary
    assert (summary.steps, summary.sparse) == (10, 14)
    assert summary.dense == {"fewer tokens than min_tokens": 20, "outside start_percent … end_percent": 6}
    assert summary.by_step.keys() == set(range(4, 11)) and summary.by_block.keys() == {TransformerBlock("", 0)}
    lines = [record.getMessage() for record in caplog.records]
    assert sum("dense attention: fewer tokens than min_tokens (32 < 64)" in line for line in lines) == 1
    assert sum("14 attention calls sparse" in line for line in lines) == 1
    assert sum("sparsity by step: 4 " in line for line in lines) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_means_of_a_run():
    q = torch.zeros(1, 2, 128, 8)
    run, call = RunState(SigmaWindow(0.0, 1.0)), AttentionCall(q, q, q, "BHND")
    run.begin()
    for step, kept in enumerate((0.25, 0.75)):
        run.next_step(torch.tensor([1.0 - step]), Patcher.percent_to_sigma, None)
        for block in range(2):
            stats = SpargeStats(torch.full((1, 2), kept), torch.full((1, 2), 0.5))
            run.add_call(call, TransformerBlock("", block), Stopwatch(torch.device("cpu")).stop(), stats)
    summary = run.end()
    assert summary.sparsity == pytest.approx(0.5) and summary.pv_skipped == pytest.approx(0.5)
    assert summary.by_step == pytest.approx({1: 0.75, 2: 0.25})
    assert summary.by_block == pytest.approx({TransformerBlock("", 0): 0.5, TransformerBlock("", 1): 0.5})
    assert run.end() is None


def test_error_ends_the_run_without_reading_statistics():
    override = SpargeOverride(SETTINGS)

    def fail(options):
        attend(options)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        sample(override, fail)
    summary = override.run.summary
    assert (summary.sparse, summary.sparsity) == (1, None)
    assert not override.run.running
    sample(override, attend)
    assert override.run.summary.sparse == 10 and override.run.summary.sparsity is not None


def test_run_without_sparse_calls_warns(caplog):
    def warnings(override, evaluate, **kwargs):
        caplog.clear()
        sample(override, evaluate, **kwargs)
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    [line] = warnings(SpargeOverride(SETTINGS), lambda options: attend(options, tokens=32))
    assert "every attention call stayed dense" in line
    [line] = warnings(SpargeOverride(SETTINGS), lambda options: None, slot=attend)
    assert "took the model's attention over" in line and "attend" in line
    [line] = warnings(SpargeOverride(SETTINGS), lambda options: None)
    assert "can't be overridden" in line
    inner = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, min_tokens=256))
    assert warnings(inner, attend, slot=SpargeOverride(SETTINGS, inner)) == []  # another node's patch is on top


def test_declined_calls_go_on_as_they_came():
    def previous(func, *args, **kwargs):
        handed_on.append((func, args, kwargs))
        return func(*args, **kwargs)

    handed_on = []
    override = SpargeOverride(SETTINGS, previous)
    options = {SLOT: override}
    seen = attend(options, tokens=32, scale=0.5, _inside_attn_wrapper=True)
    [(_, args, kwargs)] = handed_on
    assert seen == [(args, kwargs)]
    assert len(args) == 4 and args[3] == 2
    assert kwargs == {"transformer_options": options, "scale": 0.5, "_inside_attn_wrapper": True}
    attend(options)
    assert len(handed_on) == 1


def test_every_declined_call_goes_on():
    """Also the second, and one after the earlier override has failed."""
    seen = []

    def previous(func, *args, **kwargs):
        seen.append(args)
        if len(seen) == 2:
            raise ValueError("an error of its own")
        return func(*args, **kwargs)

    options = {SLOT: SpargeOverride(SETTINGS, previous)}
    attend(options, tokens=16)
    with pytest.raises(ValueError, match="of its own"):
        attend(options, tokens=16)
    attend(options, tokens=16)
    assert len(seen) == 3


def test_unknown_call_goes_on():
    assert len(attend({SLOT: SpargeOverride(SETTINGS)}, is_causal=True)) == 1


def test_two_overrides_that_take_each_other_for_previous_end_at_the_backend():
    def on_top(func, *args, **kwargs):
        return override(func, *args, **kwargs)

    override = SpargeOverride(SETTINGS, on_top)
    assert len(attend({SLOT: on_top}, tokens=32)) == 1
    assert len(attend({SLOT: override}, tokens=32)) == 1


def test_masked_sparse_call_ignores_hidden_keys():
    override = SpargeOverride(NodeSettings(SpargeParams(cdf_threshold=1.0), start_percent=0.0, min_tokens=64))
    q, k, v = torch.randn(3, 1, 128, 16, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(128) < 100)[None, None, None]
    out = override(None, q, k, v, 2, mask, transformer_options={})
    heads = [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2).reshape(out.shape))


def test_copies_of_a_models_options_share_the_override():
    override = SpargeOverride(SETTINGS)
    assert copy.deepcopy({SLOT: override})[SLOT] is override
    assert not hasattr(override, "to")


def test_compiled_models_follow_the_window():
    """A decision must not be frozen into a compiled model."""
    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.5, min_tokens=64))
    x = torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(0))

    def backend(q, k, v, heads, **kwargs):
        return q * 2

    def model(options):
        return options[SLOT](backend, x, x, x, 2, transformer_options=options) + 1

    def outputs(model):
        collected = []
        sample(override, lambda options: collected.append(model(options)), steps=4)
        return collected

    compiled, eager = outputs(torch.compile(model, backend="eager")), outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    assert override.run.summary.sparse == 2 and not torch.equal(eager[0], eager[-1])


def test_threads_are_counted_together():
    override = SpargeOverride(SETTINGS)

    def evaluate(options):
        threads = [threading.Thread(target=attend, args=(options,), kwargs={"tokens": tokens})
                   for tokens in (128, 32) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    sample(override, evaluate, steps=3)
    assert override.run.summary.sparse == 12
    assert override.run.summary.dense == {"fewer tokens than min_tokens": 12}


def test_blocks_that_the_model_lacks_are_named_at_the_end(caplog):
    def lines(blocks, evaluate):
        caplog.clear()
        override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, min_tokens=64, dense_blocks=blocks))
        sample(override, lambda options: override.names.count(
            lambda x, t, c_concat, c_crossattn, control, inner, **conds: evaluate(inner), None, None,
            transformer_options=options))
        return [line for line in caplog.messages if "has no attention" in line]

    caplog.set_level(logging.INFO)
    [line] = lines(ListedBlocks.parse("0, 99, foo:3"), attend)
    assert line.endswith("names blocks in which this model has no attention: 99, foo:3")
    assert lines(ListedBlocks.parse("0"), attend) == lines(ListedBlocks(), attend) == []
    assert lines(ListedBlocks.parse("99"), lambda options: None) == []  # nothing is known


def defined_in(module):
    """A function of another module, made as nodes make their overrides."""
    def override(func, *args, **kwargs):
        return func(*args, **kwargs)

    override.__module__ = module
    return override


@pytest.mark.parametrize("override, expected", (
    (defined_in("/home/me/ComfyUI/custom_nodes/ComfyUI-KJNodes.nodes.optimizations"), "the node pack ComfyUI-KJNodes"),
    (functools.partial(defined_in("/srv/packs/some_x_pack.main"), 1), "the node pack some.pack"),
    (defined_in("comfy_extras.nodes_sparse"), "comfy_extras.nodes_sparse.defined_in"),
    (SpargeOverride(SETTINGS), "another Apply SpargeAttn"),
    (Patcher(), f"{Patcher.__module__}.Patcher"),
))
def test_names_of_other_overrides(override, expected):
    assert describe(override) == expected


@pytest.mark.parametrize("tokens, heads", ((0, 2), (128, 0), (128, None), (128, 17), (128, 3)))
def test_odd_calls_go_to_the_backend(tokens, heads):
    x = torch.zeros(1, tokens, 16)
    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, min_tokens=0))
    out = override(lambda q, *args, **kwargs: q, x, x, x, heads, transformer_options={})
    assert out is x

"""The widget dense_steps in a real sampling run, on plans that are taken for those of a fast kernel."""
from dataclasses import replace

import checkpoints
import comfy_host
import pytest
import torch
from sampling import SPARSE, apply, node_class, relative_l1, sample, widget_defaults

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

WAN = replace(checkpoints.FAMILIES["wan"], latent=(1, 16, 2, 32, 32))  # 512 tokens
STEPS, TIMED = 12, 3
SLOT = "optimized_attention_override"
OUTSIDE = "outside start_percent … end_percent"


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(WAN, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def fast(comfy_nodes, monkeypatch):
    monkeypatch.setattr(comfy_host.pack_module(comfy_nodes, "nodes.call.plan").SparsePlan, "fast", True)


def run(comfy_nodes, model, family=WAN, **widgets):
    """The latent and the summary."""
    patched = apply(comfy_nodes, model, selection=SPARSE, **widgets)
    latent = sample(patched, family, steps=STEPS)
    return latent, patched.model_options["transformer_options"][SLOT].run.summary


def test_prompts_without_it_get_the_default(comfy_nodes, wan):
    node = node_class(comfy_nodes)
    values = {**widget_defaults(node), "selection": SPARSE}
    del values["dense_steps"]
    patched = node.execute(model=wan, **values).result[0]
    assert patched.model_options["transformer_options"][SLOT].settings.dense_steps == "quantised"


@pytest.mark.parametrize("refreshes", (0, 3))
def test_the_picture_stays(comfy_nodes, wan, fast, refreshes):
    """The reference, which takes the kernels' place, is exact."""
    widgets = {"start_percent": 0.3, "refreshes": refreshes}
    model, own = run(comfy_nodes, wan, dense_steps="model", **widgets)
    quantised, summary = run(comfy_nodes, wan, **widgets)
    assert own.quantised == {} and own.sparse == summary.sparse > 0
    assert summary.not_sparse == own.dense
    assert sum(summary.quantised.values()) == own.dense[OUTSIDE] + own.dense.get("refresh of the residuals", 0) - TIMED
    assert relative_l1(quantised, model) < 1e-4


@pytest.mark.parametrize("refreshes", (0, 3))
def test_strict(comfy_nodes, wan, fast, monkeypatch, refreshes):
    """Nearly the same picture, of whose dense steps something is skipped."""
    # Attention of random weights is spread out.
    monkeypatch.setattr(comfy_host.pack_module(comfy_nodes, "nodes.call.plan"), "STRICT", 0.7)
    widgets = {"start_percent": 0.3, "refreshes": refreshes}
    whole, own = run(comfy_nodes, wan, **widgets)
    strict, summary = run(comfy_nodes, wan, dense_steps="strict", **widgets)
    assert summary.quantised == own.quantised and summary.sparse == own.sparse and own.quantised_sparsity is None
    assert 0 < summary.quantised_sparsity < 1 and relative_l1(strict, whole) < 0.02


def test_containers(comfy_nodes, tmp_path_factory, monkeypatch, fast):
    """MiniMax-H3 hands its tensors over in containers."""
    family = checkpoints.FAMILIES["minimax_h3"]
    loaded = checkpoints.written(family, tmp_path_factory.mktemp("h3"), monkeypatch)
    widgets = {"family": family, "start_percent": 0.6}
    model, own = run(comfy_nodes, loaded, dense_steps="model", **widgets)
    quantised, summary = run(comfy_nodes, loaded, **widgets)
    assert sum(summary.quantised.values()) == own.dense[OUTSIDE] - TIMED > 0
    assert relative_l1(quantised, model) < 1e-4


def test_another_nodes_attention_stays(comfy_nodes, wan, fast):
    below = wan.clone()
    below.model_options["transformer_options"][SLOT] = lambda func, *args, **kwargs: func(*args, **kwargs)
    _, summary = run(comfy_nodes, below, start_percent=0.6)
    assert summary.quantised == {} and summary.dense[OUTSIDE] > TIMED


def test_out_of_memory(comfy_nodes, wan, fast, monkeypatch):
    """The call goes to the model's attention, and the picture is the same bit for bit."""
    module = comfy_host.pack_module(comfy_nodes, "nodes.run.kernel_calls")
    kernels = module.sparge_attention

    def full(*args, return_stats, **call):
        if not return_stats:
            raise torch.OutOfMemoryError("no room")
        return kernels(*args, return_stats=return_stats, **call)

    model, _ = run(comfy_nodes, wan, start_percent=0.6, dense_steps="model")
    monkeypatch.setattr(module, "sparge_attention", full)
    latent, summary = run(comfy_nodes, wan, start_percent=0.6)
    assert torch.equal(latent, model) and summary.dense["out of memory"] > 0

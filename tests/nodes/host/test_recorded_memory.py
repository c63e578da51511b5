"""Newer versions of ComfyUI record what an evaluation allocates; what the pack keeps must not be among it."""
from contextlib import contextmanager
from dataclasses import replace

import checkpoints
import comfy_host
import pytest
import torch
from sampling import SPARSE, apply, probed, sample
from test_tuning import tune

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

FAMILY = replace(checkpoints.FAMILIES["wan"], latent=(1, 16, 2, 32, 32))  # 512 tokens


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(FAMILY, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def recording(comfy_nodes, monkeypatch):
    """(whether the record is paused now, the same at each call of the kernels)."""
    import comfy.model_prefetch

    paused, seen = [], []

    @contextmanager
    def pause():
        paused.append(True)
        try:
            yield
        finally:
            paused.pop()

    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", pause, raising=False)
    for name, function in (("run.kernel_calls", "sparge_attention"), ("run.kernel_calls", "attention_residual"),
                           ("call.measure", "sparge_attention")):
        module = comfy_host.pack_module(comfy_nodes, f"nodes.{name}")
        kernels = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, kernels=kernels, **kwargs: (
            seen.append(bool(paused)), kernels(*args, **kwargs))[1])
    return paused, seen


def test_sparse_calls_and_residuals_are_not_recorded(comfy_nodes, wan, recording):
    paused, seen = recording
    below, probe = probed(wan)
    patched = apply(comfy_nodes, below, selection=SPARSE, refreshes=2)
    dense = []
    probe_call = type(probe).__call__
    patched.model_options["transformer_options"]["optimized_attention_override"].previous = (
        lambda *args, **kwargs: (dense.append(bool(paused)), probe_call(probe, *args, **kwargs))[1])
    sample(patched, FAMILY, steps=6)
    assert len(seen) == 6 * FAMILY.calls and all(seen)
    assert dense and not any(dense), "dense attention belongs to the evaluation"
    assert not paused


def test_a_search_is_not_recorded(comfy_nodes, wan, recording):
    paused, seen = recording
    positive = [[torch.randn(1, 48, 64), {}]]
    tune(comfy_nodes, wan, positive, FAMILY.latent)
    assert seen and all(seen) and not paused

"""MiniMax-H3's containers where fast kernels take them: the result stands in v's memory, and q and k are free."""
from types import SimpleNamespace

import checkpoints
import comfy_host
import pytest
import torch
from sampling import SPARSE, apply, sample
from torch.multiprocessing.reductions import StorageWeakRef

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

SLOT = "optimized_attention_override"
FAMILY = checkpoints.FAMILIES["minimax_h3"]


@pytest.fixture(scope="module")
def model(comfy_nodes, tmp_path_factory):
    return checkpoints.written(FAMILY, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def kernels(comfy_nodes, monkeypatch):
    """The kernels; without a GPU, the reference writes to the same places. Holds which calls were to overwrite v."""
    over_v = []
    dispatch, plan = (comfy_host.pack_module(comfy_nodes, name) for name in ("kernels.dispatch", "nodes.call.plan"))

    def watched(attention):
        def attend(q, k, v, out, lse, call):
            over_v.append(out is v)
            return attention(q, k, v, out, lse, call)
        return attend

    def by_reference(q, k, v, out, lse, call):
        made = torch.empty_like(out)
        stats = dispatch.reference.attention(q, k, v, made, lse, call)
        out.copy_(made)
        return stats

    if torch.cuda.is_available():
        pipeline = dispatch._pipeline()
        monkeypatch.setattr(pipeline, "attention", watched(pipeline.attention))
    else:
        stand_in = SimpleNamespace(**{**vars(dispatch.reference), "attention": watched(by_reference)})
        monkeypatch.setattr(dispatch, "_pipeline", lambda: stand_in)
        for module in (dispatch, plan):
            monkeypatch.setattr(module, "select_implementation", lambda q: ("triton", None))
    return over_v


class Watched:
    """An override between the model and the pack's own; what became of the tensors of every long call."""

    def __init__(self, override):
        self.override, self.calls = override, []

    def container_function(self, *args, **kwargs):
        containers = args[:3]
        place, shape = containers[2].peek().data_ptr(), containers[2].peek().shape
        q, k, v = (StorageWeakRef(x.peek().untyped_storage()) for x in containers)
        out = self.override.container_function(*args, **kwargs)
        assert all(x.tensor is None for x in containers) and out.is_contiguous()
        assert q.cdata == k.cdata != v.cdata, "the model makes its tensors in another way than when this was written"
        self.calls.append((out.data_ptr() == place and out.numel() == shape.numel(), q.expired() and k.expired()))
        return out


@pytest.mark.parametrize("name", ("plain", "ordered", "dense at first", "refreshed"))
def test_the_result_takes_the_place_of_v(comfy_nodes, model, kernels, monkeypatch, name):
    """In sparse calls and in those over all blocks, and the picture stays; not where a refresh needs v again."""
    widgets = {"plain": {}, "ordered": {"hilbert": "on"}, "dense at first": {"start_percent": 0.6},
               "refreshed": {"refreshes": 3}}[name]

    def run():
        patched = apply(comfy_nodes, model, selection=SPARSE, **widgets)
        options = patched.model_options["transformer_options"]
        override, options[SLOT] = options[SLOT], Watched(options[SLOT])
        return sample(patched, FAMILY, steps=10), override.run.summary, options[SLOT].calls

    latent, summary, calls = run()
    quantised = sum(summary.quantised.values())
    assert len(kernels) == summary.sparse + quantised
    assert kernels.count(True) == summary.sparse + (quantised if name == "dense at first" else 0) > 0
    assert (quantised > 0) == (name in ("dense at first", "refreshed"))
    assert [in_place for in_place, _ in calls].count(True) == kernels.count(True)
    assert all(freed for _, freed in calls)
    kernels.clear()
    monkeypatch.setattr(comfy_host.pack_module(comfy_nodes, "kernels.dispatch"), "_takes_result", lambda *qkv: False)
    elsewhere, _, calls = run()
    assert not any(kernels) and not any(in_place for in_place, _ in calls)
    assert torch.equal(latent, elsewhere)

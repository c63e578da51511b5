"""ComfyUI's split of conditions over devices, a thread each: on two devices that are both the CPU."""
import threading

import checkpoints
import comfy_host
import pytest
import torch
from checkpoints import FAMILIES
from sampling import SPARSE, apply, condition, probed, sample
from test_tuning import tune

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

TOGETHER = 60  # seconds in which both threads have to be inside the kernels


@pytest.fixture(scope="module", params=("wan", "minimax_h3"))
def loaded(request, comfy_nodes, tmp_path_factory):
    """(family, its ModelPatcher)"""
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield family, checkpoints.written(family, tmp_path_factory.mktemp("checkpoints"), monkeypatch)


@pytest.fixture
def split(monkeypatch):
    """split(model) -> what the node MultiGPU CFG Split makes of it."""
    import comfy.model_management
    import comfy.multigpu

    devices = [torch.device("cpu"), torch.device("cpu:0")]  # two keys for one processor
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    return lambda model: comfy.multigpu.create_multigpu_deepclones(model, 2)


class Meeting:
    """Calls of the kernels, each of which waits until the other thread is in one too."""

    def __init__(self, comfy_nodes, monkeypatch, module, *functions, always=True):
        self.threads = []
        self._barrier, self._always = threading.Barrier(2), always
        module = comfy_host.pack_module(comfy_nodes, module)
        for name in functions:
            monkeypatch.setattr(module, name, self._meeting(getattr(module, name)))

    def _meeting(self, kernels):
        def call(*args, **kwargs):
            thread = threading.get_ident()
            if self._always or thread not in self.threads:
                self._barrier.wait(TOGETHER)
            self.threads.append(thread)
            return kernels(*args, **kwargs)

        return call


def conditions(family):
    return {"cfg": 4.0, "positive": condition(family),
            "negative": condition(family, family.context[0] // 2, seed=2)}


def run(comfy_nodes, model, family, change=lambda model: model, steps=2, **widgets):
    """The latent of a run and its summary."""
    patched = apply(comfy_nodes, model, selection=SPARSE, **widgets)
    latent = sample(change(patched), family, steps=steps, **conditions(family))
    return latent, patched.model_options["transformer_options"]["optimized_attention_override"].run.summary


@pytest.mark.parametrize("refreshes", (0, 2))
def test_the_same_run_as_on_one_device(comfy_nodes, loaded, split, monkeypatch, refreshes):
    """Both threads are in the kernels at once: no lock is held meanwhile."""
    family, model = loaded
    steps = 6 if refreshes else 2
    below, probe = probed(model)
    expected, one = run(comfy_nodes, below, family, steps=steps, refreshes=refreshes)
    meeting = Meeting(comfy_nodes, monkeypatch, "nodes.run.kernel_calls", "sparge_attention",
                      "attention_residual")
    actual, two = run(comfy_nodes, below, family, split, steps=steps, refreshes=refreshes)
    assert len(set(meeting.threads)) == 2
    assert torch.equal(actual, expected)
    dense = 2 * refreshes * family.calls
    assert two.sparse == 2 * steps * family.calls - dense and len(probe.declined) == 2 * dense
    assert (two.steps, two.sparse, two.dense, two.residuals) == (one.steps, one.sparse, one.dense, one.residuals)
    assert two.by_step == pytest.approx(one.by_step) and two.by_block == pytest.approx(one.by_block)


def test_tuned_together(comfy_nodes, loaded, split, monkeypatch):
    family, model = loaded
    meeting = Meeting(comfy_nodes, monkeypatch, "nodes.call.measure", "sparge_attention", always=False)
    latent = family.latents(torch.zeros(family.latent)) * 0
    positive = conditions(family)["positive"]
    params = tune(comfy_nodes, split(model), positive, latent, cfg=4.0, steps=2, l1=0.5, l2=0.6)[0]
    assert len(set(meeting.threads)) == 2 and len(params.layers) == family.calls
    expected, one = run(comfy_nodes, model, family, params=params)
    actual, two = run(comfy_nodes, model, family, split, params=params)
    assert torch.equal(actual, expected) and two.sparse == one.sparse > 0

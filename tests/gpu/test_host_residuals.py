"""Residuals in the host's memory: the same results as on the GPU, bit for bit, and no wait of the host for a copy."""
import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from comfyui_spargeattn.nodes.run import refresh_schedule
from comfyui_spargeattn.nodes.run.host_memory import SLOTS, Memory
from comfyui_spargeattn.nodes.run.residual_memory import SHARE
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.gpu.device import needs_gpu
from comfyui_spargeattn.tests.nodes.stand_ins import sample

pytestmark = needs_gpu
LAYERS, STEPS, HEADS, TOKENS, DIM = 6, 12, 4, 2000, 64
BYTES = HEADS * TOKENS * (DIM + 4)  # of a residual of one condition
SETTINGS = NodeSettings(SpargeParams(topk=0.2), start_percent=0.2, min_tokens=1000, refreshes=3)
PLENTY = 1 << 34


@pytest.fixture(autouse=True)
def short_runs_refresh(monkeypatch):
    """Refreshes in fewer steps than pay for them."""
    monkeypatch.setattr(refresh_schedule, "FEWEST", 6)


class Pins:
    """Pinned memory, as ComfyUI pins it."""

    def __init__(self):
        self.now, self.pinned = {}, 0

    def pin(self, x):
        if torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 1) != 0:
            return False
        self.now[x.data_ptr()] = x.nbytes
        self.pinned += 1
        return True

    def unpin(self, x):
        assert self.now.pop(x.data_ptr()) == x.nbytes
        assert torch.cuda.cudart().cudaHostUnregister(x.data_ptr()) == 0


@pytest.fixture(scope="module")
def qkv():
    """q, k and v of each layer, for two conditions, (B, L, H·D)."""
    made = [drifting_qkv(2, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device="cuda", seed=i) for i in range(LAYERS)]
    return [[x.transpose(1, 2).flatten(2).contiguous() for x in layer] for layer in made]


def backend(q, k, v, heads, **kwargs):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def outputs(qkv, on_gpu, pins, watched=False, counted=None):
    """All results of a run with room on the GPU for so many residuals of one condition, and how it went.

    counted: a list that gets the bytes that residuals were counted to take, at each evaluation.

    The conditions are evaluated together in the first half of the run, and then one after the other.
    """
    memory = Memory(lambda device: PLENTY if device.type == "cpu" else int(on_gpu * BYTES / SHARE), pins.pin,
                    pins.unpin)
    override, results = SpargeOverride(SETTINGS, memory=memory), []

    def evaluate(options):
        step = override.run.steps
        if counted is not None:
            counted.append(override.run.residuals.room.counted)
        for batch in ((0, 2),) if step <= STEPS // 2 else ((0, 1), (1, 2)):
            inner = {**options, "uuids": ["positive", "negative"][slice(*batch)]}
            override.names.count(attend, None, None, None, None, None, inner, batch=batch, step=step)

    def attend(x, t, c_concat, c_crossattn, control, options, batch, step):
        for layer, (q, k, v) in enumerate(qkv):
            now = [x[slice(*batch)] * (1 + 0.01 * step) for x in (q, k, v)]
            results.append(options[SLOT](backend, *now, HEADS, transformer_options={**options, "block_index": layer}))

    def watch(options):
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            evaluate(options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    sample(override, watch, steps=STEPS)
    return results, override.run.summary


@pytest.mark.parametrize("on_gpu", (2 * SLOTS, 2 * SLOTS + 5), ids=("all in the host", "some on the GPU"))
def test_results_are_those_of_residuals_on_the_gpu(qkv, on_gpu):
    """Also the second run's, for which kernels are compiled, with an error for every wait of the host."""
    none = Pins()
    expected, summary = outputs(qkv, 100, none)
    assert none.pinned == 0 and f"added to {summary.sparse} sparse calls" in summary.residuals and summary.sparse > 0
    assert sum(summary.quantised.values()) > 0
    without, _ = outputs(qkv, 0, none)
    assert not all(torch.equal(a, b) for a, b in zip(without, expected, strict=True))
    for watched in (False, True):
        pins = Pins()
        found, host = outputs(qkv, on_gpu, pins, watched)
        assert pins.pinned > 0 and not pins.now, "pinned memory is given back at the end of a run"
        assert "in the host's memory" in host.residuals and "no memory" not in host.residuals
        assert f"added to {summary.sparse} sparse calls" in host.residuals
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_memory_on_the_gpu_is_bounded(qkv):
    """Beyond the results, a run holds two slots and what one call makes."""
    outputs(qkv, 2 * SLOTS, Pins())  # compiles
    peaks = {}
    for on_gpu in (0, 2 * SLOTS, 100):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        outputs(qkv, on_gpu, Pins())
        peaks[on_gpu] = torch.cuda.max_memory_allocated()
    assert peaks[2 * SLOTS] - peaks[0] <= (2 * SLOTS + 2) * BYTES + 2 ** 21, peaks
    assert peaks[100] - peaks[0] >= (2 * LAYERS - 2) * BYTES, peaks


def test_memory_is_what_was_counted(qkv):
    """Against a run without refreshes, beside the residual of a call that is made while the old one is in use."""
    peaks = []
    for on_gpu in (0, 100, 0, 100):  # the first two compile
        counted = []
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        _, summary = outputs(qkv, on_gpu, Pins(), counted=counted)
        peaks.append(torch.cuda.max_memory_allocated())
        assert summary.residuals.startswith("none:") == (on_gpu == 0)
        assert counted[-1] == 2 * LAYERS * BYTES and counted[0] == 0
    call = 2 * BYTES
    assert counted[-1] - call <= peaks[3] - peaks[2] <= counted[-1] + 2 * call + 2 ** 21, peaks


def test_an_error_in_a_run_gives_all_back(qkv):
    pins = Pins()
    memory = Memory(lambda device: PLENTY if device.type == "cpu" else int(2 * SLOTS * BYTES / SHARE), pins.pin,
                    pins.unpin)
    override = SpargeOverride(SETTINGS, memory=memory)

    def evaluate(options):
        inner = {**options, "uuids": ["positive", "negative"]}
        override.names.count(attend, None, None, None, None, None, inner)

    def attend(x, t, c_concat, c_crossattn, control, options):
        for layer, (q, k, v) in enumerate(qkv):
            options[SLOT](backend, q, k, v, HEADS, transformer_options={**options, "block_index": layer})
        if override.run.steps == 5:
            assert pins.now
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        sample(override, evaluate, steps=STEPS)
    assert pins.pinned and not pins.now

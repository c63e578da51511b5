"""What the kernels are given in a run with refreshes."""
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from comfyui_spargeattn.nodes.run import kernel_calls
from comfyui_spargeattn.nodes.run.host_memory import Memory
from comfyui_spargeattn.tests.nodes.stand_ins import sample

SETTINGS = NodeSettings(SpargeParams(topk=0.3), start_percent=0.0, min_tokens=64, refreshes=4)


def test_residuals_are_extrapolated_at_a_refresh(monkeypatch):
    """From the one in use, as far as the schedule says, and not at the first refresh."""
    made, leads, added = [], [], []
    attention, residual = kernel_calls.sparge_attention, kernel_calls.attention_residual

    def record_made(*args, **how):
        made.append(residual(*args, **how))
        leads.append(override.run.refresh.lead)
        return made[-1]

    def record_added(*args, residual, **how):
        added.append((len(made), residual))
        return attention(*args, residual=residual, **how)

    def evaluate(options):
        q, k, v = torch.randn(3, 1, 128, 16, generator=torch.Generator().manual_seed(override.run.steps))
        override.names.count(lambda x, t, c_concat, c_crossattn, control, inner: inner[SLOT](
            lambda q, *args, **kwargs: q, q, k, v, 2, transformer_options=inner), None, None,
            transformer_options={**options, "uuids": ["positive"]})

    monkeypatch.setattr(kernel_calls, "attention_residual", record_made)
    monkeypatch.setattr(kernel_calls, "sparge_attention", record_added)
    override = SpargeOverride(SETTINGS, memory=Memory(lambda device: 1 << 30))
    sample(override, evaluate, steps=12)
    expected = [made[0]]
    for new, lead in zip(made[1:], leads[1:]):
        expected.append(new.extrapolated(expected[-1], lead) if lead else new)
    assert len(made) == 4 and leads[0] == 0 and any(leads)
    assert len(added) == 8 and {refreshes for refreshes, _ in added} >= {1, 2, 3}
    for refreshes, used in added:
        assert torch.equal(used.tensor(), expected[refreshes - 1].tensor())

"""What stands in for ComfyUI in tests of the override: its ModelPatcher, a sampling run, an attention call."""
import torch

from comfyui_spargeattn.nodes.override import SLOT


class Patcher:
    """The part of ComfyUI's ModelPatcher that the callbacks use, with the sampling of a flow model without shift."""

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self

    @staticmethod
    def percent_to_sigma(percent):
        return 1.0 - percent


class Container:
    """ComfyUI's AttentionTensorContainer."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "the container is empty"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def sample(override, evaluate, steps=10, slot=None, conditions=1):
    """A sampling run as ComfyUI drives it: `evaluate(options)` stands for the diffusion model."""
    patcher, sigmas = Patcher(), torch.linspace(1, 0, steps + 1)
    override.on_pre_run(patcher)
    try:
        for sigma in sigmas[:-1]:
            timestep = sigma.reshape(1)
            for _ in range(conditions):
                options = {SLOT: slot or override, "sample_sigmas": sigmas, "sigmas": timestep, "block_index": 0}
                override.on_prepare_state(patcher, timestep, {"transformer_options": options})
                evaluate(options)
    finally:
        override.on_cleanup(patcher)


def attend(options, tokens=128, func=None, **kwargs):
    """One attention call through the override in `options`; returns what the backend was called with."""
    x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(0))
    seen = []

    def backend(*args, **kwargs):
        seen.append((args, kwargs))
        return args[0]

    out = options[SLOT](func or backend, x, x, x, 2, transformer_options=options, **kwargs)
    assert out.shape == x.shape
    return seen

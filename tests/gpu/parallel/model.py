"""A Wan transformer of diffusers on one GPU, and on two by its context parallelism."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.gpu.parallel.setup import ALL, ATTENTIONS, BY_HEADS_ALONE, Setup


def build(setup: Setup):
    """The same random Wan transformer at every call."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with setup.device:
        model = WanTransformer3DModel(num_attention_heads=setup.heads, attention_head_dim=setup.dim,
                                      ffn_dim=setup.ffn, num_layers=setup.layers, text_dim=256)
    return model.to(setup.dtype).eval()


def evaluation(setup: Setup, model) -> Callable[[], Tensor]:
    """An evaluation of the model, of a smooth latent, as a latent is in most steps of a run."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = setup.grid
    coarse = torch.randn(1, 16, max(2, t // 4), max(2, h // 4), max(2, w // 4), generator=generator)
    latent = F.interpolate(coarse, (t, 2 * h, 2 * w), mode="trilinear")
    latent += 0.2 * torch.randn(latent.shape, generator=generator)
    text = torch.randn(1, 64, 256, generator=generator)
    latent, text = (x.to(setup.device, setup.dtype) for x in (latent, text))
    when = torch.tensor([500], device=setup.device)
    return torch.no_grad()(lambda: model(latent, when, text, return_dict=False)[0])


def measure_model(setup: Setup) -> dict:
    """name of the attention → where → time, speed-up and errors of an evaluation."""
    from diffusers import ContextParallelConfig

    from comfyui_spargeattn.kernels.integrations import diffusers as integration

    found, outputs = {}, {}
    for where in ("one GPU", "ulysses", "ring"):
        model = build(setup)
        run = evaluation(setup, model)
        backend = integration.register(params=ALL, **setup.settings)
        model.set_attention_backend("spargeattn")
        if where != "one GPU":
            # diffusers numbers processes by their accelerators, and a CPU counts none.
            on_cpu = mock.patch("torch.accelerator.device_count", lambda: 1)
            with nullcontext() if setup.cuda else on_cpu:
                model.enable_parallelism(config=ContextParallelConfig(**{f"{where}_degree": 2}))
        for name, params in ATTENTIONS.items():
            if where == "ring" and name in BY_HEADS_ALONE:
                continue
            model.set_attention_backend("spargeattn" if params else "native")
            backend.params = params or ALL
            backend.calls.clear()
            out = outputs[name, where] = run().float()
            calls = dict(backend.calls)
            found.setdefault(name, {})[where] = {
                "ms": setup.milliseconds(run), "L1 to one GPU": relative_l1(out, outputs[name, "one GPU"]),
                "L1 to dense": relative_l1(out, outputs["dense", "one GPU"]), "calls": calls}
        del model, run
    return found

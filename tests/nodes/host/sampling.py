"""Sampling runs of a test family through ComfyUI's own sampler, and what is asked of them."""
from contextlib import contextmanager

import pytest
import torch
from checkpoints import MIN_TOKENS


def condition(family, length=None, seed=1, mask=None):
    """A random text condition of `length` tokens (the family's length when None), as ComfyUI passes conditions."""
    generator = torch.Generator().manual_seed(seed)
    length = family.context[0] if length is None else length
    context = torch.randn(1, length, family.context[1], generator=generator)
    extra = {}
    if family.pooled:
        extra["pooled_output"] = torch.randn(1, family.pooled, generator=generator)
    if mask is not None:
        extra["attention_mask"] = mask
    elif family.text_mask:
        extra["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    return [[context, extra]]


def sample(model, family, *, steps=2, cfg=1.0, positive=None, negative=None, batch=1, callback=None,
           sampler="euler", seed=0, **more):
    """Steps from seeded noise; the same arguments give the same latent, bit for bit, on one machine.

    Video and audio come back as (B, elements of both).
    """
    import comfy.sample

    noise = family.latents(torch.randn((batch, *family.latent[1:]), generator=torch.Generator().manual_seed(seed)))
    positive = condition(family) if positive is None else positive
    negative = condition(family, seed=2) if negative is None else negative
    out = comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", positive, negative, noise * 0, seed=0,
                              callback=callback, disable_pbar=True, **more)
    return torch.cat([latent.flatten(1) for latent in out.unbind()], 1) if family.audio else out


def relative_l1(actual, expected):
    """sum |actual - expected| / sum |expected|"""
    return ((actual - expected).abs().sum() / expected.abs().sum()).item()


class Probe:
    """An attention override that records the calls which reach it and passes them on unchanged."""

    def __init__(self):
        self.calls = []  # (sigma, queries, keys); sigma as a tensor: reading it here would wait for a GPU

    def __call__(self, func, *args, **kwargs):
        axis = -2 if kwargs.get("skip_reshape") else 1  # (B, H, L, D), else (B, L, H * D)
        sigma = kwargs["transformer_options"]["sigmas"].flatten()[0]
        self.calls.append((sigma, args[0].shape[axis], args[1].shape[axis]))
        return func(*args, **kwargs)

    @property
    def declined(self):
        """Noise levels of the self-attention calls long enough to be sparse, one entry a call, in order."""
        return [sigma.item() for sigma, queries, keys in self.calls if queries == keys >= MIN_TOKENS]


def probed(model):
    """A clone of `model` whose attention calls pass a Probe, and the Probe."""
    clone, probe = model.clone(), Probe()
    clone.model_options["transformer_options"]["optimized_attention_override"] = probe
    return clone, probe


def node_class(comfy_nodes):
    return comfy_nodes.NODE_CLASS_MAPPINGS["ApplySpargeAttn"]


def widget_defaults(node):
    """The values a freshly added node has in the editor; a DynamicCombo's first option with its own widgets."""
    values = {}
    for entry in node.define_schema().inputs:
        if entry.io_type == "COMFY_DYNAMICCOMBO_V3":
            option = entry.options[0]
            values[entry.id] = {entry.id: option.key, **{inner.id: inner.default for inner in option.inputs}}
        elif getattr(entry, "default", None) is not None:
            values[entry.id] = entry.default
    return values


CONSERVATIVE = {"selection": "cdf", "cdf_threshold": 0.98, "similarity_threshold": 0.6}
SPARSE = {"selection": "topk", "keep_percent": 50.0, "similarity_threshold": -1.0}


def apply(comfy_nodes, model, **widgets):
    """The patched clone that Apply SpargeAttn returns: defaults, but sparse from the first step and 512 tokens on."""
    node = node_class(comfy_nodes)
    values = {**widget_defaults(node), "selection": CONSERVATIVE, "start_percent": 0.0, "end_percent": 1.0,
              "min_tokens": MIN_TOKENS, "dense_blocks": "", **widgets}
    return node.execute(model=model, **values).result[0]


@contextmanager
def interrupted_at(share):
    """A user interrupts what runs inside once its progress bar is beyond `share`; it has to end by that."""
    import comfy.model_management
    import comfy.utils

    def stop(value, total, preview, node_id=None):
        if value > share * total:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            yield
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)

"""Names of a model's attention layers, the same in every evaluation: what tuned parameters are kept under."""
from __future__ import annotations

from collections import Counter

from torch import Tensor

from .blocks import Block
from .calling import AttentionCall

_KEY = "spargeattn_layers"  # in transformer_options: how many self-attention calls each block has made so far


def number_layers(executor, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
                  control: dict | None = None, transformer_options: dict | None = None, **conds):
    """An APPLY_MODEL wrapper: starts the count of an evaluation of the model."""
    options = {**(transformer_options or {}), _KEY: Counter()}
    return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def layer_name(call: AttentionCall, block: Block | None) -> str | None:
    """"single:3" and the like, "single:3#2" for the second self-attention of that block, "#5" where the model does not
    number its blocks. None for cross-attention and outside an evaluation. To be asked once a call.
    """
    count = call.transformer_options.get(_KEY)
    if count is None or call.queries != call.keys:
        return None
    name = "" if block is None else str(block)
    count[name] += 1
    return name if name and count[name] == 1 else f"{name}#{count[name]}"

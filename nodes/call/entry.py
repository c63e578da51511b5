"""The way into a call: from ComfyUI's arguments to a plan."""
from __future__ import annotations

from typing import Any, NamedTuple

from .arguments import AttentionCall, UnsupportedCall
from .layer_names import LayerNames
from .plan import CallSite, Dense, NodeSettings, SparsePlan, plan_call
from .transformer_blocks import TransformerBlock


class EnteredCall(NamedTuple):
    """An attention call, where it is made, and what becomes of it."""

    call: AttentionCall
    site: CallSite
    plan: SparsePlan | Dense


def enter(args: tuple, kwargs: dict[str, Any], settings: NodeSettings,
          names: LayerNames) -> EnteredCall | Dense:
    """Read the arguments that follow `func` in a call of an override, name its layer and plan it; once a call.

    Returns a Dense alone where the arguments are not understood.
    """
    try:
        call = AttentionCall.parse(args, kwargs)
    except UnsupportedCall as problem:
        return Dense("unsupported call", str(problem))
    block = TransformerBlock.of(call.transformer_options)
    layer = names.name(call, block)
    site = CallSite(block, layer, names.doubt(layer, call.transformer_options))
    return EnteredCall(call, site, plan_call(call, settings, site))

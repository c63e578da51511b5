"""The way into a call: from ComfyUI's arguments to a plan."""
from __future__ import annotations

from typing import Any, NamedTuple

from .arguments import AttentionCall, UnsupportedCall, token_counts
from .layer_names import LayerNames
from .plan import CallSite, Dense, NodeSettings, SparsePlan, not_wanted_at, plan_call
from .transformer_blocks import TransformerBlock


class EnteredCall(NamedTuple):
    """An attention call, where it is made, and what becomes of it.

    call: None where it was not read further, because the plan is dense and what the call is does not matter.
    """

    call: AttentionCall | None
    site: CallSite
    plan: SparsePlan | Dense


def enter(args: tuple, kwargs: dict[str, Any], settings: NodeSettings, names: LayerNames) -> EnteredCall:
    """Read the arguments that follow `func` in a call of an override, name its layer and plan it; once a call.

    Where the numbers of tokens decide, nothing more is read: a UNet has a hundred calls a step that stay dense, and
    waits for the host as it is.
    """
    tokens = token_counts(args, kwargs)
    declined = tokens and not_wanted_at(*tokens, settings)
    if declined:
        options = kwargs.get("transformer_options") or {}
        return EnteredCall(None, _site(*tokens, options, names), declined)
    try:
        call = AttentionCall.parse(args, kwargs)
    except UnsupportedCall as problem:
        return EnteredCall(None, CallSite(), Dense("unsupported call", str(problem)))
    site = _site(call.q_tokens, call.k_tokens, call.transformer_options, names)
    return EnteredCall(call, site, plan_call(call, settings, site))


def _site(q_tokens: int, k_tokens: int, transformer_options: dict[str, Any], names: LayerNames) -> CallSite:
    block = TransformerBlock.of(transformer_options)
    if q_tokens != k_tokens:
        return CallSite(block)
    layer = names.name(transformer_options, block)
    return CallSite(block, layer, names.doubt(layer, transformer_options))

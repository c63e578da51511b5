"""Attention calls that the kernels compute: sparse, dense, and what the sparse ones lack of dense ones."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...kernels import FastPathError, Residual, attention_residual, block_map, sparge_attention
from ...kernels.failures import is_of_the_device
from ..call.arguments import AttentionCall
from ..call.plan import ALONE, CallSite, Dense, NodeSettings, SparsePlan, plan_without_residual
from ..call.transformer_blocks import TransformerBlock
from ..log import log
from .compile_notice import announced
from .residual_memory import ALLOWED
from .state import RunState


class KernelCalls:
    """Computes the calls of a run and adds them to its record. Several threads may use it."""

    def __init__(self, run: RunState, settings: NodeSettings, say: Callable[[str], None]):
        """say: shows the user a line, from any thread."""
        self._run = run
        self._settings = settings
        self._say = say

    def sparse(self, plan: SparsePlan, call: AttentionCall, site: CallSite) -> Tensor | Dense:
        """The result in the caller's form, or why there is none after all."""
        run, curve = self._run, self._settings.curve
        residual = self._residual(call, site)
        if residual is None and self._settings.refreshes and (plan.needs_residual or not self._tuned(plan)):
            run.say_once("no residual", f"calls without a residual keep at least {ALONE:.0%} of the attention")
            of_widgets = plan_without_residual(plan, call, self._settings, site)
            if isinstance(of_widgets, Dense):
                return of_widgets
            plan = of_widgets.keeping(ALONE)
        watch = run.watch(call)
        result = self._attend(plan, call, residual, return_stats=True)
        if isinstance(result, Dense):
            return result
        out, stats = result
        watch.stop()
        if plan.untuned:
            run.say_once(plan.untuned, f"thresholds of the widgets: {plan.untuned}")
        tokens = ""
        if not isinstance(plan.layout, str):
            tokens = f"{plan.curve} order of {plan.layout}"
        elif curve is not None:
            run.say_once(plan.layout, f"tokens keep the model's order, no {curve} order: {plan.layout}")
        wanted = run.add_call(call, site.block, watch, stats, tokens, plan.untuned)
        if wanted is not None:
            self._keep_map(wanted, call, _arguments(plan, call))
        return call.give_back(out)

    def dense(self, plan: SparsePlan, call: AttentionCall, site: CallSite, why: Dense) -> Tensor | Dense:
        """Dense attention by the kernels, or nearly, in the caller's form, or why there is none after all. why: it is
        dense."""
        strict = self._settings.dense_steps == "strict"
        result = self._attend(plan.strict() if strict else plan.over_all_blocks(), call, return_stats=strict)
        if isinstance(result, Dense):
            return result
        out, stats = result if strict else (result, None)
        self._run.add_quantised(call, site.block, why, stats)
        return call.give_back(out)

    def count_residual(self, call: AttentionCall, site: CallSite) -> None:
        """Count the memory that a residual of this call will take, before the first refresh."""
        try:
            self._run.residuals.count(call, site, self._run.steps)
        except Exception as error:
            self._lost(error)

    def keep_residual(self, plan: SparsePlan, call: AttentionCall, site: CallSite, dense: Tensor) -> None:
        """Keep what sparse attention lacks of the result of a dense call, in the caller's form."""
        store, result, evaluation = self._run.residuals, call.take_back(dense), self._run.steps
        keys = store.keys(call, site)
        if keys is None or result is None:
            return
        try:
            if store.admits(call, keys, evaluation):
                lead = self._run.refresh.lead
                earlier = store.earlier(keys, call.q.device) if lead else None
                made = attention_residual(call.q, call.k, call.v, result, skipped=plan.skipped, earlier=earlier,
                                          lead=lead, **_arguments(plan, call))
                store.put(keys, made, evaluation)
        except (FastPathError, torch.OutOfMemoryError):  # sparse calls will meet it too, and say why
            store.drop(keys)
        except Exception as error:
            self._lost(error)
            store.drop(keys)
        if store.refused:
            self._run.say_once("no memory for residuals", f"some layers get no residual: {ALLOWED}")

    def _attend(self, plan: SparsePlan, call: AttentionCall, residual: Residual | None = None,
                return_stats: bool = False) -> Any:
        """What `sparge_attention` returns, or a Dense that says why it can't."""
        try:
            with self._compilation_announced(call, plan, residual):
                return sparge_attention(call.q, call.k, call.v, skipped=plan.skipped, residual=residual,
                                        return_stats=return_stats, overwrite_v=call.owned, **_arguments(plan, call))
        # What fails after v was overwritten is another error, and ends the run: there is nothing left to compute from.
        # A traceback holds the tensors of what failed, so the dense call has to come after these except clauses.
        except FastPathError as problem:
            return Dense("fast kernels failed", str(problem))
        except torch.OutOfMemoryError:
            return Dense("out of memory", f"{call.q_tokens} tokens")

    def _tuned(self, plan: SparsePlan) -> bool:
        return self._settings.tuned is not None and not plan.untuned

    def _residual(self, call: AttentionCall, site: CallSite) -> Residual | None:
        """What this layer and condition lacked at the last refresh."""
        store, run = self._run.residuals, self._run
        try:
            return store.get(store.keys(call, site), call.q.device, run.steps) if run.refresh.levels else None
        except torch.OutOfMemoryError:  # those of several conditions are put together in new memory
            return None
        except Exception as error:  # pinned memory and streams may fail in ways of their own, and a call can do without
            self._lost(error)
            return None

    def _lost(self, error: Exception) -> None:
        """Say that a residual could not be kept or fetched, unless that is an error of the device."""
        if is_of_the_device(error):
            raise error
        self._run.say_once("residual lost", f"a residual was lost: {type(error).__name__}: {error}")

    def _keep_map(self, block: TransformerBlock, call: AttentionCall, how: dict[str, Any]) -> None:
        """Keep the block map of the first sample of the batch for a report."""
        how |= {name: how[name][:1] for name in ("key_padding_mask", "key_bias") if name in how}
        try:
            self._run.add_map(block, block_map(call.q[:1], call.k[:1], **how).mask()[0])
        except Exception as error:  # the call is done, and a picture in a report is not worth a run
            if is_of_the_device(error):
                raise
            log.warning("SpargeAttn: there is no block map of block %s", block, exc_info=True)

    def _compilation_announced(self, call: AttentionCall, plan: SparsePlan,
                               residual: Residual | None) -> AbstractContextManager:
        if call.q.device.type == "cpu":  # a call computes there, which takes its time
            return nullcontext()
        kind = (call.q.device, call.q.dtype, call.q.shape[-1], *(call.key_mask or ()), plan.order is None,
                plan.pv_dtype, plan.skipped, plan.params.selection, residual is None)
        return announced(kind, self._say)


def _arguments(plan: SparsePlan, call: AttentionCall) -> dict[str, Any]:
    """What `block_map` and the attention functions take beside the tensors."""
    return {"params": plan.params, "layout": call.layout, "scale": call.scale, "order": plan.order,
            "pv_dtype": plan.pv_dtype, "impl": plan.impl, **plan.exact_tokens, **(call.key_mask or {})}

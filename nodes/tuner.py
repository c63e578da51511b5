"""Tuning while a model is being sampled: some calls are searched as they pass, and nothing of them is kept.

The model goes on with the output of dense attention, so that every call is one that a dense run would make.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ..kernels import FastPathError
from .call.arguments import AttentionCall
from .call.entry import enter
from .call.layer_names import LayerNames
from .call.measure import CallMeasure
from .call.model_rules import expect_tokens
from .call.plan import CallSite, Dense, NodeSettings, SparsePlan
from .call.tuned_setting import free_device_tensors
from .host import shared_memory, unrecorded
from .log import log
from .override import SLOT, SpargeOverride
from .run.refresh_schedule import RefreshSchedule
from .run.refreshed_calls import RefreshedCalls
from .run.sigma_window import sigma_range
from .tuned.params import TunedLayer, TunedParams
from .tuned.search import LayerSearch

_KEY = "spargeattn_tuning"
_SEARCH_SHARE = 30  # a step that is searched takes about as long as this many others


class Tuner:
    """Samples models on which calls are searched, or only measured with `learn` off. Threads of several GPUs share it.

    Where `settings` ask for refreshes, they come as in a run of Apply SpargeAttn: what that computes densely is not
    searched, and other calls are measured with the residual that they would get.

    tuned: what is known by now.
    searched: number of calls that were searched or measured.
    said: why calls were not tuned.
    """

    def __init__(self, tuned: TunedParams, settings: NodeSettings, samples: int,
                 progress: Callable[[float], None] = lambda share: None, check: Callable[[], None] = lambda: None):
        """
        tuned: what the search starts from.
        settings: which calls count.
        samples: number of sampling steps to search, spread evenly over the window of `settings`.
        progress: gets the done share of the current run.
        check: raises where the user has stopped the run.
        """
        self.tuned = tuned
        self.settings = settings
        self.samples = samples
        self.learn = True
        self.searched = 0
        self.said: set[str] = set()
        self._progress, self._check = progress, check
        self._previous: Callable | None = None
        self._names = LayerNames()
        self._refresh = RefreshSchedule(settings.refreshes)
        self._refreshed = RefreshedCalls(shared_memory().free)
        self._lock = threading.Lock()  # of what changes; not held during a search
        self._reset()

    def _reset(self) -> None:
        self._names.begin()
        self._refresh.reset()
        self._refreshed.clear()
        self._chosen: Sequence[int] = ()
        self._timestep: Tensor | None = None
        self._active = self._keeping = False
        self._step = self._steps = self._calls = self._calls_before = 0

    def __deepcopy__(self, memo: dict) -> Tuner:
        return self  # ComfyUI copies the dictionaries that hold it

    def patch(self, model):
        """A clone of a ModelPatcher on which this object takes the attention calls."""
        options = model.model_options.get("transformer_options", {})
        if isinstance(options.get(SLOT), SpargeOverride):
            raise ValueError("model must come without Apply SpargeAttn, because dense attention is what the search "
                             "compares with; connect the model from before that node")
        patched = model.clone()
        self._previous = options.get(SLOT)
        patched.model_options["transformer_options"][SLOT] = self
        patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, _KEY, self._on_prepare_state)
        patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, self._on_cleanup)
        for wrapper in (expect_tokens, self._names.count):
            patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, wrapper)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, self._refresh.on_sampler)
        self._reset()
        return patched

    def _on_prepare_state(self, patcher, timestep: Tensor, model_options: dict, *_) -> None:
        """ModelPatcher callback: the sampler is about to evaluate the model."""
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
        if sigmas is None:
            return
        schedule, now = sigmas.tolist(), timestep.flatten()[0].item()
        levels = schedule[:-1]
        if not self._chosen:
            self._chosen = self._spread(schedule, patcher.get_model_object("model_sampling").percent_to_sigma)
            self._steps = len(levels)
        self._step = min(range(len(levels)), key=lambda i: abs(levels[i] - now))
        if timestep is not self._timestep:  # otherwise another condition of the same evaluation
            self._timestep = timestep
            self._enter_evaluation(levels, now)
        self._calls_before, self._calls = max(self._calls, self._calls_before), 0
        self._say_progress()

    def _on_cleanup(self, patcher) -> None:
        """ModelPatcher callback: sampling has ended, perhaps by an error or an interruption."""
        free_device_tensors()
        self._refreshed.clear()

    def _enter_evaluation(self, levels: list[float], now: float) -> None:
        """now: the noise level. levels: of all steps."""
        self._refresh.advance(lambda: now)
        self._active = self._step in self._chosen and not self._refresh.due
        self._keeping = self._refresh.due and any(levels[step] < now for step in self._chosen)
        if self._keeping:
            self._refreshed.begin(self._refresh.lead)

    def _spread(self, schedule: list[float], percent_to_sigma: Callable[[float], float]) -> list[int]:
        """Indices of the steps to search. schedule: noise levels of the run, with the one that it ends at."""
        start, end = self.settings.start_percent, self.settings.end_percent
        lowest, highest = sigma_range(start, end, percent_to_sigma)
        self._refresh.begin(schedule, lowest, highest, float(percent_to_sigma(0.0)))
        if self._refresh.problem:
            raise ValueError(f"refreshes must be 0 in this sampling, because {self._refresh.problem}; got "
                             f"{self.settings.refreshes}")
        inside = [i for i, level in enumerate(schedule[:-1])
                  if lowest <= level <= highest and level not in self._refresh.levels]
        if not inside:
            raise ValueError("start_percent and end_percent must leave a sampling step between them; got "
                             f"{start:g} and {end:g} with {len(schedule) - 1}")
        number = min(self.samples, len(inside))
        return [inside[(2 * i + 1) * len(inside) // (2 * number)] for i in range(number)]

    def _say_progress(self) -> None:
        inside = min(1.0, self._calls / self._calls_before) if self._calls_before else 0.0
        done = self._step + _SEARCH_SHARE * sum(i < self._step for i in self._chosen)
        done += inside * (_SEARCH_SHARE if self._active else 1)
        self._progress(done / (self._steps + _SEARCH_SHARE * len(self._chosen)))

    def __call__(self, func: Callable, *args, **kwargs) -> Tensor:
        """ComfyUI's attention override."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._attend)(func, args, kwargs)
        return self._attend(func, args, kwargs)

    def _attend(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        self._check()
        dense = func(*args, **kwargs) if self._previous is None else self._previous(func, *args, **kwargs)
        with unrecorded():
            self._look_at(args, kwargs, dense)
        return dense

    def _look_at(self, args: tuple, kwargs: dict, dense: Tensor) -> None:
        """Search a call, if it is one of those to search, whose dense result is known."""
        entered = enter(args, kwargs, self.settings, self._names)
        if isinstance(entered, Dense):
            self._say(str(entered))
            return
        call, site, plan = entered
        if isinstance(plan, Dense):
            self._say(plan.reason)
        elif site.doubt:
            self._say(site.doubt)
        elif site.layer is not None:
            with self._lock:
                self._calls += 1
            if self._keeping:
                self._refreshed.keep(call, site, dense)
            if self._active:
                self._search(site.layer, call, site, plan, dense)
                self._say_progress()

    def _search(self, layer: str, call: AttentionCall, site: CallSite, plan: SparsePlan, dense: Tensor) -> None:
        """Tune on this call. Where it can't be measured, the sampling goes on with what was found before."""
        try:
            refreshed = self._refreshed.get(call, site) if self._refresh.count else None
            if isinstance(refreshed, str):
                self._say(refreshed)
                return
            measure = CallMeasure(call, plan.layout, dense, self._check, refreshed)
            if measure.finite:
                self._learn_from(layer, call, plan, measure)
            else:
                self._say("dense attention gives NaN or Inf")
        except FastPathError as problem:
            self._say(f"fast kernels failed ({problem})")
        except torch.OutOfMemoryError:
            self._say(f"out of memory ({call.q_tokens} tokens)")

    def _learn_from(self, name: str, call: AttentionCall, plan: SparsePlan, measure: CallMeasure) -> None:
        heads, kv_heads = call.heads
        head_dim = call.q.shape[-1]
        tokens = str(call.q_tokens) if isinstance(plan.layout, str) else f"{call.q_tokens}: {plan.layout}"
        while True:
            known = self.tuned.layers.get(name)
            if known is None and not self.learn:
                return
            layer = known or TunedLayer(LayerSearch.start(heads, kv_heads, self.tuned.bounds), head_dim)
            search = layer.search
            if (search.heads, search.kv_heads, layer.head_dim) != (heads, kv_heads, head_dim):
                raise ValueError(f"params must fit the model: layer {name} was tuned for {search.heads} heads of q, "
                                 f"{search.kv_heads} of k and head_dim {layer.head_dim}; this call has {heads}, "
                                 f"{kv_heads} and {head_dim}")
            found = replace(layer, search=search.learn(measure) if self.learn else search.evaluate(measure))
            with self._lock:
                # Where another thread was faster, its result is the one to begin with; that makes most of it short.
                if self.tuned.layers.get(name) is known:
                    self.tuned = self.tuned.with_layer(name, found.with_tokens(tokens) if self.learn else found)
                    self.searched += 1
                    return

    def _say(self, reason: str) -> None:
        with self._lock:
            new = reason not in self.said
            self.said.add(reason)
        if new:
            log.info("SpargeAttn: not tuned: %s", reason)

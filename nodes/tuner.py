"""Tuning while a model is being sampled: some calls are searched as they pass, and nothing of them is kept.

The model goes on with the output of dense attention, so that every call is one that a dense run would make. A call is
searched where it stands: beside its own tensors there are one output and a slice of it in float32 at a time.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ..kernels import FastPathError, select_implementation, sparge_attention
from ..kernels.capability import arch_of, supports_fp8
from .call.arguments import AttentionCall, UnsupportedCall
from .call.layer_names import LayerNames
from .call.model_rules import TokenLayout, expect_tokens
from .call.plan import Dense, NodeSettings, SparsePlan, plan_call
from .call.transformer_blocks import TransformerBlock
from .log import log
from .override import SLOT, SpargeOverride
from .tuned.params import TunedLayer, TunedParams, free_device_tensors, order_of
from .tuned.search import LayerSearch, Measured, TunedSetting

_KEY = "spargeattn_tuning"
_SEARCH_SHARE = 30  # a step that is searched takes about as long as this many others
_TOKENS_AT_ONCE = 8192
_TOLERANCE = 1e-5  # of noise levels, see sigma_window


class Tuner:
    """Samples models on which calls are searched, or with `learn` off only measured. `params` is what is known by now.

    settings: which calls count. samples: number of sampling steps to search, spread evenly over the window of
    `settings`. progress: gets the done share of the current run. check: raises where the user has stopped the run.
    said: why calls were not tuned. With several GPUs, threads share it.
    """

    def __init__(self, params: TunedParams, settings: NodeSettings, samples: int,
                 progress: Callable[[float], None] = lambda share: None, check: Callable[[], None] = lambda: None):
        self.params = params
        self.settings = settings
        self.samples = samples
        self.learn = True
        self.searched = 0
        self._progress, self._check = progress, check
        self._previous: Callable | None = None
        self.said: set[str] = set()
        self._names = LayerNames()
        self._lock = threading.Lock()  # of what changes; not held during a search
        self._reset()

    def _reset(self) -> None:
        self._names.begin()
        self._chosen: Sequence[int] = ()
        self._active = False
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
        patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, lambda patcher: free_device_tensors())
        for wrapper in (expect_tokens, self._names.count):
            patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, wrapper)
        self._reset()
        return patched

    def _on_prepare_state(self, patcher, timestep: Tensor, model_options: dict, *_) -> None:
        """ModelPatcher callback: the sampler is about to evaluate the model."""
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
        if sigmas is None:
            return
        levels, now = sigmas.tolist()[:-1], timestep.flatten()[0].item()
        if not self._chosen:
            self._chosen = self._spread(levels, patcher.get_model_object("model_sampling").percent_to_sigma)
            self._steps = len(levels)
        self._step = min(range(len(levels)), key=lambda i: abs(levels[i] - now))
        self._active = self._step in self._chosen
        self._calls_before, self._calls = max(self._calls, self._calls_before), 0
        self._say_progress()

    def _spread(self, levels: list[float], percent_to_sigma: Callable[[float], float]) -> list[int]:
        """Indices of the steps to search."""
        highest = percent_to_sigma(self.settings.start_percent) * (1 + _TOLERANCE)
        lowest = percent_to_sigma(self.settings.end_percent) * (1 - _TOLERANCE)
        inside = [i for i, level in enumerate(levels) if lowest <= level <= highest]
        if not inside:
            raise ValueError("start_percent and end_percent must leave a sampling step between them; got "
                             f"{self.settings.start_percent:g} and {self.settings.end_percent:g} with {len(levels)}")
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
        try:
            call = AttentionCall.parse(args, kwargs)
        except UnsupportedCall as problem:
            self._say(f"unsupported call ({problem})")
            return dense
        block = TransformerBlock.of(call.transformer_options)
        layer = self._names.name(call, block)
        doubt = self._names.doubt(layer, call.transformer_options)
        plan = plan_call(call, self.settings, block, in_window=True)
        if isinstance(plan, Dense):
            self._say(str(plan.reason))
        elif doubt:
            self._say(doubt)
        elif layer is not None:
            with self._lock:
                self._calls += 1
            if self._active:
                self._search(layer, call, plan, dense)
                self._say_progress()
        return dense

    def _search(self, layer: str, call: AttentionCall, plan: SparsePlan, dense: Tensor) -> None:
        """Tune on this call, or not where it can't be measured: the sampling goes on, with what was found before."""
        try:
            measure = CallMeasure(call, plan.layout, dense, self._check)
            if measure.finite:
                self._learn_from(layer, call, plan, measure)
            else:
                self._say("dense attention gives NaN or Inf")
        except FastPathError as problem:
            self._say(f"fast kernels failed ({problem})")
        except torch.OutOfMemoryError:
            self._say(f"out of memory ({call.queries} tokens)")

    def _learn_from(self, layer: str, call: AttentionCall, plan: SparsePlan, measure: CallMeasure) -> None:
        heads, kv_heads = call.heads
        tokens = str(call.queries) if isinstance(plan.layout, str) else f"{call.queries}: {plan.layout}"
        while True:
            known = self.params.layers.get(layer)
            if known is None and not self.learn:
                return
            tuned = known or TunedLayer(LayerSearch.start(heads, kv_heads, self.params.bounds), call.q.shape[-1])
            search = tuned.search
            if (search.heads, search.kv_heads, tuned.head_dim) != (heads, kv_heads, call.q.shape[-1]):
                raise ValueError(f"params must fit the model: layer {layer} was tuned for {search.heads} heads of q, "
                                 f"{search.kv_heads} of k and head_dim {tuned.head_dim}; this call has {heads}, "
                                 f"{kv_heads} and {call.q.shape[-1]}")
            found = replace(tuned, search=search.learn(measure) if self.learn else search.evaluate(measure))
            with self._lock:
                # Where another thread was faster, its result is the one to begin with; that makes most of it short.
                if self.params.layers.get(layer) is known:
                    self.params = self.params.with_layer(layer, found.with_tokens(tokens) if self.learn else found)
                    self.searched += 1
                    return

    def _say(self, reason: str) -> None:
        with self._lock:
            new = reason not in self.said
            self.said.add(reason)
        if new:
            log.info("SpargeAttn: not tuned: %s", reason)


class CallMeasure:
    """Runs one attention call with settings, and compares with the dense result.

    finite: whether the dense result is, without which there is nothing to compare with.
    """

    def __init__(self, call: AttentionCall, layout: TokenLayout | str, dense: Tensor,
                 check: Callable[[], None] = lambda: None):
        self._call, self._layout, self._check = call, layout, check
        self._mask = call.key_mask
        self._dense = dense if dense.ndim == 4 else dense.unflatten(-1, (call.q.shape[2], -1))
        self._axis = 2 if call.layout == "BHND" else 1
        self._norm = self._sums(None).clamp(min=1e-30)
        self.finite = bool(self._norm.isfinite().all())
        device = call.q.device
        self._impl = select_implementation(call.q)[0]
        self._fp8 = self._impl == "triton" and supports_fp8(arch_of(device))

    def __call__(self, setting: TunedSetting) -> Measured | None:
        self._check()
        call = self._call
        order = order_of(setting.curves, self._layout, call.q.device)
        if order is False or (setting.pv_dtype == "fp8" and not self._fp8):
            return None
        out, stats = sparge_attention(
            call.q, call.k, call.v, params=setting.params, layout=call.layout, scale=call.scale,
            order=order, sink_keys=() if order is None else self._layout.others, pv_dtype=setting.pv_dtype,
            skipped=setting.skipped, impl=self._impl, return_stats=True, **self._mask)
        error = self._sums(out).div_(self._norm).amax(0)  # the worst of the batch
        error, kept = torch.stack([error, stats.kept.mean(0)]).cpu()
        return Measured(error, kept)

    def _sums(self, out: Tensor | None) -> Tensor:
        """Σ|out − dense| of every head, or Σ|dense|: float32 (B, H)."""
        total = 0.0
        for start in range(0, self._dense.shape[self._axis], _TOKENS_AT_ONCE):
            length = min(_TOKENS_AT_ONCE, self._dense.shape[self._axis] - start)
            part = self._dense.narrow(self._axis, start, length).to(torch.float32, copy=True)
            if out is not None:
                part = part.sub_(out.narrow(self._axis, start, length))
            total = total + part.abs_().sum((self._axis, 3))
        return total

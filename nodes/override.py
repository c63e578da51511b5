"""The object that takes a model's attention calls: some go sparse, the others go where they went before."""
from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .call.arguments import AttentionCall
from .call.entry import enter
from .call.layer_names import LayerNames, handed_on
from .call.plan import OUTSIDE, REFRESH, CallSite, Dense, NodeSettings, SparsePlan, not_wanted_at
from .call.tuned_setting import free_device_tensors
from .log import log
from .report.advice import about_little_skipped
from .report.line import NodeLine, after_run, while_sampling
from .run.host_memory import Memory
from .run.kernel_calls import KernelCalls
from .run.sigma_window import SigmaWindow
from .run.state import RunState
from .run.summary import RunSummary

SLOT = "optimized_attention_override"  # ComfyUI's key in transformer_options; one slot, no chain
CALLBACK_KEY = "spargeattn"  # of this pack's callbacks and wrappers on a model


class SpargeOverride:
    """ComfyUI's attention override, and the ModelPatcher callbacks that tell it where the sampling is.

    ComfyUI copies the dictionaries of a model's options at every turn and shares the objects in them. So this one
    object serves all clones of one patched model, and its settings are frozen. Calls that stay dense go to
    `previous`, or without one to the backend chosen on the command line.
    """

    def __init__(self, settings: NodeSettings, previous: Callable | None = None,
                 show: Callable[[str], None] | None = None,
                 memory: Memory = Memory(),
                 unrecorded: Callable[[], AbstractContextManager] = nullcontext):
        """
        previous: the override that was on the model when the node ran.
        show: shows the user a line on the node, from any thread.
        memory: of which residuals take a share.
        unrecorded: keeps what is allocated inside out of ComfyUI's record of an evaluation. The sparse calls run in it,
            because the run keeps some of what they make.
        """
        self.settings = settings
        self.previous = previous
        self._line = NodeLine(show)
        self._unrecorded = unrecorded
        self.run = RunState(SigmaWindow(settings.start_percent, settings.end_percent), settings.refreshes, memory)
        self._kernels = KernelCalls(self.run, settings, self._say)
        self.names = LayerNames(settings.tuned.layers if settings.tuned else ())
        self._slot: Any = self
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict) -> SpargeOverride:
        return self

    def __call__(self, func: Callable, *args, **kwargs) -> Tensor:
        return self._outside_graphs(func, args, kwargs)

    def container_function(self, *args, **kwargs) -> Tensor:
        """As a call, with q, k and v in containers of which the call owns the tensors; ComfyUI looks for this name.

        The containers are empty afterwards. Whoever computes the call densely gets them full, and can free each tensor
        once it is quantised.
        """
        from comfy.ldm.modules.attention import optimized_attention  # the backend; it takes containers as well

        return self._outside_graphs(optimized_attention, args, kwargs)

    def _outside_graphs(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        if torch.compiler.is_compiling():
            # A traced call would keep the decision of the step it was traced in, because ComfyUI's node for
            # torch.compile drops the guards on transformer_options. As a decorator, `disable` would import the compiler
            # for everybody.
            return torch.compiler.disable(self._attend_and_tell)(func, args, kwargs)
        return self._attend_and_tell(func, args, kwargs)

    def _attend_and_tell(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        out = self._attend(func, args, kwargs)
        if self.run.running:
            self._line.update(lambda: while_sampling(self.run.so_far()))
        return out

    def _attend(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        with self._unrecorded():
            entered = enter(args, kwargs, self.settings, self.names)
        call, site, plan = entered
        if call is None:
            with handed_on(site.layer):
                return self._stay_dense(plan, func, args, kwargs)
        if site.block is None and self.settings.dense_blocks:
            self.run.say_once("dense_blocks", "dense_blocks has no effect, this model does not number its blocks")
        refreshed = plan if self.run.refresh.serves and isinstance(plan, SparsePlan) else None
        if self.run.refresh.ahead and isinstance(plan, SparsePlan):
            self._kernels.count_residual(call, site)
        containers = _containers(args)
        if containers and not refreshed:  # which needs the tensors twice
            call = replace(call, owned=True)
        with self._unrecorded():
            out = plan if isinstance(plan, Dense) else self._compute(plan, call, site)
        if isinstance(out, Dense):
            never_sparse = not_wanted_at(call.q_tokens, call.k_tokens, self.settings)
            watch = None if never_sparse else self.run.watch(call, dense=True)
            if refreshed:  # what the tensors hold is needed afterwards, and who gets containers may overwrite it
                func, args = _opened(func, args)
            elif containers:  # hold nothing that the call may free
                call = call.without_tensors()
                del entered
            with handed_on(site.layer):
                out = self._stay_dense(out, func, args, kwargs)
            if watch is not None:
                self.run.add_call(call, site.block, watch.stop())
        else:
            # Not freed inside `unrecorded`: memory of the evaluation has to go where the record sees it.
            for container in containers:
                container.take()
        if refreshed:
            with self._unrecorded():
                self._kernels.keep_residual(refreshed, call, site, out)
        return out

    def _compute(self, plan: SparsePlan, call: AttentionCall, site: CallSite) -> Tensor | Dense:
        """What the kernels make of a call, or why the model's own attention has to take it."""
        inside = self.run.window.inside
        if inside and not self.run.refresh.due:
            return self._kernels.sparse(plan, call, site)
        why = REFRESH if inside else OUTSIDE
        # Whoever put another attention on the model wants it for dense calls. A few calls of each shape stay with the
        # model's own, for the report to compare times with.
        if self.settings.dense_steps == "model" or self.previous or not plan.fast or not self.run.timed_dense(call):
            return why
        return self._kernels.dense(plan, call, site, why)

    def _say(self, message: str) -> None:
        log.info("SpargeAttn: %s", message)
        self._line.write(lambda: message)

    def _stay_dense(self, dense: Dense, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        self.run.add_dense(dense)
        # An override that puts itself on top at run time takes this one for its predecessor, and it may be `previous`
        # here. So a declined call that comes back ends at the backend.
        if self.previous is None or getattr(self._thread, "handing_on", False):
            return func(*args, **kwargs)
        self._thread.handing_on = True
        try:
            if _containers(args) and hasattr(self.previous, "container_function"):
                return self.previous.container_function(*args, **kwargs)
            func, args = _opened(func, args)
            return self.previous(func, *args, **kwargs)
        finally:
            self._thread.handing_on = False

    def on_pre_run(self, patcher) -> None:
        """ModelPatcher callback: sampling starts; with several GPUs, once for each."""
        self._slot = self
        self.names.begin()
        self.run.begin()

    def on_prepare_state(self, patcher, timestep: Tensor, model_options: dict, *_) -> None:
        """ModelPatcher callback: the sampler is about to evaluate the model, perhaps once for each condition."""
        options = model_options.get("transformer_options", {})
        self._slot = options.get(SLOT)
        # Not fetched when the node ran, because nodes further down may patch the model's sampling.
        self.run.next_step(timestep, patcher.get_model_object("model_sampling").percent_to_sigma,
                           options.get("sample_sigmas"))

    def on_cleanup(self, patcher) -> None:
        """ModelPatcher callback: sampling has ended, perhaps by an error or an interruption."""
        slot, self._slot = self._slot, self
        try:
            summary = self.run.end()
            if summary is not None and summary.steps:
                self._tell(summary, None if slot is self else slot)
        except Exception:
            # These are only the books of a run. They must not cost a user a finished picture, nor replace the error
            # that ended the run. This hides no error of the device: it stays with the device, and fetching the picture
            # raises it again.
            log.warning("SpargeAttn: the numbers of this run could not be read", exc_info=True)
        finally:
            free_device_tensors()

    def _tell(self, summary: RunSummary, on_top: object) -> None:
        unknown = self.settings.dense_blocks.without(self.names.blocks)
        if unknown and self.names.blocks:
            log.info("SpargeAttn: dense_blocks names blocks in which this model has no attention: %s", unknown)
        log.info("SpargeAttn: %s", summary)
        if self.settings.verbose and summary.by_step:
            log.info("%s", summary.table())
        problem = _why_nothing_was_sparse(summary, on_top)
        if problem:
            self.run.summary = replace(summary, problem=problem)
            log.warning("SpargeAttn: nothing was sparse in this run: %s", problem)
        little = about_little_skipped(summary, self.settings)
        if little:
            log.warning("SpargeAttn: %s", little)
        self._line.write(lambda: after_run(replace(summary, problem=problem)))


def _containers(args: tuple) -> tuple:
    """The containers of q, k and v, where they came in some."""
    return args[:3] if args and not isinstance(args[0], Tensor) and hasattr(args[0], "peek") else ()


def _opened(func: Callable, args: tuple) -> tuple[Callable, tuple]:
    """The same call with q, k and v as tensors."""
    containers = _containers(args)
    if not containers:
        return func, args
    return inspect.unwrap(func), (*(container.take() for container in containers), *args[3:])


def _why_nothing_was_sparse(summary: RunSummary, on_top: object) -> str:
    """Empty where something was. on_top: the override that took this one's place, None where none did."""
    if summary.sparse or summary.unread or isinstance(on_top, SpargeOverride):
        return ""  # an interrupted run might have become sparse; another override of this pack reports for both
    if summary.not_sparse:
        return "every attention call stayed dense"
    if on_top is None:
        return "no attention call arrived; this model's attention can't be overridden"
    return (f"no attention call arrived, {describe(on_top)} took the model's attention over; put Apply SpargeAttn "
            f"after the node that set it")


def describe(override: object) -> str:
    """A name for another override that a user understands: the node or the pack that it comes from."""
    while isinstance(override, functools.partial):
        override = override.func
    if isinstance(override, SpargeOverride):
        return "another Apply SpargeAttn"
    kind = override if hasattr(override, "__qualname__") else type(override)
    if "set_model_optimized_attention" in kind.__qualname__:
        return "the attention that a node such as Model Attention Backend chose"
    package = kind.__module__.split(".")[0]
    if os.path.dirname(package):  # ComfyUI imports packs under their paths, with "_x_" for the dots in them
        return f"the node pack {os.path.basename(package).replace('_x_', '.')}"
    return f"{kind.__module__}.{kind.__qualname__}".split(".<locals>")[0]

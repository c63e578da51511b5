"""Which attention calls go sparse, and how: a pure decision, from what is known before anything is launched."""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels import SpargeParams, select_implementation
from ...kernels.capability import DTYPES, MAX_HEAD_DIM, arch_of, supports_fp8
from ..tuned.params import TunedParams, order_of, params_on, setting_for
from .arguments import AttentionCall
from .model_rules import UNSEEN, TokenLayout, token_layout
from .transformer_blocks import ListedBlocks, TransformerBlock

# The eager path is for trying things out; on longer sequences it would keep a CPU busy for minutes a call.
MAX_CPU_TOKENS = 16384
# What the widget `hilbert` chooses: a curve through the grid of visual tokens, or the model's own order. No order is
# the best at every threshold (tests/bench/results/h100_orders.json), so auto leaves it alone.
HILBERT_CHOICES = {"auto": None, "on": "hilbert", "off": None}


@dataclass(frozen=True)
class NodeSettings:
    """What the user chose on the node.

    start_percent, end_percent: the part of the sampling, from 0 to 1, that may go sparse. min_tokens: shorter sequences
    stay dense. dense_blocks: blocks that stay dense. skipped, pv_dtype: as in `sparge_attention`. verbose: log the
    sparsity of every block and step. hilbert: a choice of `CURVES`. tuned: replaces params, skipped, pv_dtype and
    hilbert in the layers that it knows.
    """

    params: SpargeParams
    start_percent: float = 0.2
    end_percent: float = 1.0
    dense_blocks: ListedBlocks = field(default_factory=ListedBlocks)
    min_tokens: int = 2048
    skipped: str = "drop"
    pv_dtype: str = "auto"
    verbose: bool = False
    hilbert: str = "auto"
    tuned: TunedParams | None = None

    @property
    def curve(self) -> str | None:
        return HILBERT_CHOICES[self.hilbert]


@dataclass(frozen=True)
class SparsePlan:
    """How a call goes sparse.

    impl, skipped, pv_dtype: as in `sparge_attention`. order: token order for blocking, as there; None keeps the
    model's. layout: of the tokens, or why it is not known. curve: name of the order. untuned: why the tuned parameters
    have nothing for this call, where there are any.
    """

    params: SpargeParams
    impl: str
    order: Tensor | None = None
    layout: TokenLayout | str = UNSEEN
    skipped: str = "drop"
    pv_dtype: str = "auto"
    curve: str = "row-major"
    untuned: str = ""

    @property
    def sink_keys(self) -> tuple[tuple[int, int], ...]:
        """Text and other tokens outside the grid, where the grid's tokens are reordered without them."""
        return () if self.order is None else self.layout.others


@dataclass(frozen=True)
class Dense:
    """Why a call stays dense: `reason` is the same for every call of a kind, `detail` describes this one."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def plan_call(call: AttentionCall, settings: NodeSettings, block: TransformerBlock | None, in_window: bool,
              layer: str | None = None, doubt: str = "") -> SparsePlan | Dense:
    """What becomes of a call.

    in_window: the sampling step lies between start_percent and end_percent. layer: name by which tuned parameters know
    the call. doubt: why it may be another layer's.
    """
    declined = _not_wanted(call, settings, block, in_window) or _no_implementation_takes(call)
    if declined:
        return declined
    impl = _implementation_here(call, settings)
    if isinstance(impl, Dense):
        return impl
    layout = token_layout(call.queries, call.transformer_options)
    untuned = ""
    if settings.tuned is not None:
        plan = doubt or _tuned_plan(call, settings.tuned, layer, layout, impl)
        if not isinstance(plan, str):
            return plan
        untuned = plan
    how = dict(layout=layout, skipped=settings.skipped, pv_dtype=settings.pv_dtype, untuned=untuned)
    if settings.curve is None or isinstance(layout, str):
        return SparsePlan(settings.params, impl, **how)
    return SparsePlan(settings.params, impl, layout.order(settings.curve, call.q.device), curve=settings.curve, **how)


def _tuned_plan(call: AttentionCall, tuned: TunedParams, layer: str | None, layout: TokenLayout | str,
                impl: str) -> SparsePlan | Dense | str:
    """As tuned, or why there is nothing tuned for this call."""
    setting = setting_for(tuned, layer, call)
    if isinstance(setting, str):
        return setting
    if setting is None:
        return Dense("tuned to stay dense", f"layer {layer}")
    order = order_of(setting.curves, layout, call.q.device)
    if order is False:
        return f"an order was tuned that needs the grid of the tokens: {layout}"
    # A card without FP8 is at least as exact with fp16.
    pv_dtype = "auto" if setting.pv_dtype == "fp8" else setting.pv_dtype
    curve = setting.curves[0] if len(set(setting.curves)) == 1 else "mixed"
    return SparsePlan(params_on(setting, call.q.device), impl, order, layout, setting.skipped, pv_dtype, curve)


def _not_wanted(call: AttentionCall, settings: NodeSettings, block: TransformerBlock | None,
                in_window: bool) -> Dense | None:
    if call.queries != call.keys:
        return Dense("cross-attention", f"{call.queries} queries, {call.keys} keys")
    if call.queries < settings.min_tokens:
        return Dense("fewer tokens than min_tokens", f"{call.queries} < {settings.min_tokens}")
    if not call.low_precision:
        return Dense("the model asks for full precision")
    if block is not None and block in settings.dense_blocks:
        return Dense("listed in dense_blocks", f"block {block}")
    if not in_window:
        return Dense("outside start_percent … end_percent")
    return None


def _no_implementation_takes(call: AttentionCall) -> Dense | None:
    q, k, v = call.q, call.k, call.v
    q_heads, k_heads = call.heads
    tensors = {"q": q, "k": k, "v": v} | ({} if call.mask is None else {"mask": call.mask})
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return Dense("unsupported dtype", f"q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if len({x.device for x in tensors.values()}) > 1:
        return Dense("tensors on different devices", ", ".join(f"{name} {x.device}" for name, x in tensors.items()))
    if q.shape[-1] > MAX_HEAD_DIM:
        return Dense("unsupported head_dim", f"{q.shape[-1]} > {MAX_HEAD_DIM}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1] or 0 in q.shape + k.shape:
        return Dense("shapes of q, k and v do not fit", f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k_heads != q_heads and not (call.enable_gqa and q_heads % k_heads == 0):
        return Dense("unsupported numbers of heads", f"{q_heads} of q, {k_heads} of k")
    if call.key_mask is None:
        by_query = call.mask.ndim > 1 and call.mask.shape[-2] > 1
        return Dense("mask that differs from query to query" if by_query else "unsupported mask",
                     f"{call.mask.dtype} {tuple(call.mask.shape)}")
    if call.scale is not None and not (isinstance(call.scale, (int, float)) and math.isfinite(call.scale)):
        return Dense("unsupported scale", f"{type(call.scale).__name__}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return Dense("gradients are needed")
    return None


def _implementation_here(call: AttentionCall, settings: NodeSettings) -> str | Dense:
    """The eager reference serves short sequences on a CPU; on other devices dense attention is faster than it."""
    device = call.q.device
    name, reason = select_implementation(call.q)
    if name != "reference":
        if settings.pv_dtype == "fp8" and not supports_fp8(arch_of(device)):
            return Dense("pv_precision fp8 is not supported here", f"{arch_of(device)}; choose auto or fp16")
        return name
    if device.type != "cpu":
        return Dense("no fast kernel", reason)
    if call.queries > MAX_CPU_TOKENS:
        return Dense("too many tokens for the CPU", f"{call.queries} > {MAX_CPU_TOKENS}")
    return name

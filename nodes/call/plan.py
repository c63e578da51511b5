"""Which attention calls go sparse, and how: a pure decision, made before anything is launched."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...kernels import SpargeParams, select_implementation
from ...kernels.call import NEARLY_ALL
from ...kernels.capability import DTYPES, MAX_HEAD_DIM
from ..tuned.params import TunedParams
from .arguments import AttentionCall
from .token_layout import UNSEEN, ExactTokens, TokenLayout, exact_tokens, token_layout
from .transformer_blocks import ListedBlocks, TransformerBlock
from .tuned_setting import order_of, params_on, setting_for

# The eager path is for trying things out; on longer sequences it would keep a CPU busy for minutes a call.
MAX_CPU_TOKENS = 16384
# What the widget `hilbert` chooses: a curve through the grid of visual tokens, or the model's own order. No order is
# the best at every threshold (tests/bench/results/h100_orders.json), so auto leaves it alone.
HILBERT_CHOICES = {"auto": None, "on": "hilbert", "off": None}
# What computes the steps in which attention is dense: these kernels over all blocks, where they are fast, the model's
# own attention, or these kernels over the blocks that hold nearly all of the attention.
DENSE_STEPS = "quantised", "model", "strict"
STRICT = NEARLY_ALL  # cdf_threshold of the last of these
# Least cdf_threshold of a call without a residual in a run with refreshes: few steps, little memory, a call that can't
# be told apart from others. Clips of the demo's model are at 47 dB then in 8 steps, at twice the speed of dense
# attention (tests/bench/README.md, "Refreshes").
ALONE = 0.99


@dataclass(frozen=True)
class NodeSettings:
    """What the user chose on the node.

    start_percent, end_percent: the part of the sampling, from 0 to 1, that may go sparse.
    dense_blocks: transformer blocks that stay dense.
    min_tokens: shorter sequences stay dense.
    skipped, pv_dtype: as in `sparge_attention`.
    verbose: log the sparsity of every transformer block and step.
    hilbert: a key of `HILBERT_CHOICES`.
    tuned: replaces params, skipped, pv_dtype and hilbert in the layers that it knows.
    refreshes: evaluations that compute dense attention, for those between to add what they lack of it; 0 for none.
    dense_steps: one of `DENSE_STEPS`.
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
    refreshes: int = 0
    dense_steps: str = "quantised"

    @property
    def curve(self) -> str | None:
        return HILBERT_CHOICES[self.hilbert]


@dataclass(frozen=True)
class CallSite:
    """Where in the model a call is made.

    block: None where the model does not number its transformer blocks.
    layer: the name by which tuned parameters know the call, None where it has none.
    doubt: why the call may be another layer's, empty where it is certain.
    """

    block: TransformerBlock | None = None
    layer: str | None = None
    doubt: str = ""


@dataclass(frozen=True)
class SparsePlan:
    """How a call goes sparse.

    impl, skipped, pv_dtype: as in `sparge_attention`.
    order: the token order for blocking, as there; None keeps the model's.
    layout: of the tokens, or why it is not known.
    curve: name of the order.
    untuned: why the tuned parameters have nothing for this call; empty where they have, or where there are none.
    needs_residual: whether it must not be used without one: its thresholds were tuned for refreshes.
    """

    params: SpargeParams
    impl: str
    order: Tensor | None = None
    layout: TokenLayout | str = UNSEEN
    skipped: str = "drop"
    pv_dtype: str = "auto"
    curve: str = "row-major"
    untuned: str = ""
    needs_residual: bool = False

    @property
    def exact_tokens(self) -> ExactTokens:
        """Of the call, as `sparge_attention` takes them."""
        return exact_tokens(self.layout, self.order is not None)

    @property
    def fast(self) -> bool:
        """Whether the fast kernels compute it, which are faster than other dense attention over all blocks too."""
        return self.impl != "reference"

    def over_all_blocks(self) -> SparsePlan:
        """Quantised as here, with nothing skipped, for which an order would do nothing.

        The selection is the same, so that the same compiled kernels serve, but for preparation, which mixes channels.
        They search no threshold at an amount of 1.
        """
        return SparsePlan(_ALL_BLOCKS[self.params.selection], self.impl, pv_dtype=self.pv_dtype)

    def strict(self) -> SparsePlan:
        """As here, with nearly all of the attention."""
        return replace(self.keeping(STRICT), skipped="pooled")

    def keeping(self, least: float) -> SparsePlan:
        """With blocks kept for at least this share of the predicted attention, in place of a fixed share of them."""
        return replace(self, params=_keeping(self.params, least))


@dataclass(frozen=True)
class Dense:
    """Why a call stays dense: `reason` is the same for every call of a kind, `detail` describes this one."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


_ALL_BLOCKS = {"cdf": SpargeParams(cdf_threshold=1.0), "topk": SpargeParams(topk=1.0)}
OUTSIDE = Dense("outside start_percent … end_percent")
REFRESH = Dense("refresh of the residuals")


@functools.lru_cache(maxsize=16)  # every call of a run asks for the same
def _keeping(params: SpargeParams, least: float) -> SpargeParams:
    if params.selection == "topk":
        amount = least
    else:
        amount = params.amount.clamp(min=least) if isinstance(params.amount, Tensor) else max(params.amount, least)
    return SpargeParams(cdf_threshold=amount, pv_threshold=params.pv_threshold,
                        similarity_threshold=params.similarity_threshold)


def plan_call(call: AttentionCall, settings: NodeSettings, site: CallSite = CallSite()) -> SparsePlan | Dense:
    """What becomes of a call in a step that may go sparse."""
    declined = _not_wanted(call, settings, site) or _no_implementation_takes(call)
    if declined:
        return declined
    impl = _implementation_here(call, settings)
    if isinstance(impl, Dense):
        return impl
    layout = token_layout(call.q_tokens, call.transformer_options)
    plan = SparsePlan(settings.params, impl, layout=layout, skipped=settings.skipped, pv_dtype=settings.pv_dtype)
    if settings.tuned is not None:
        tuned = site.doubt or _tuned_plan(call, settings.tuned, site.layer, layout, impl)
        if not isinstance(tuned, str):
            return tuned
        plan = replace(plan, untuned=tuned)
    if settings.curve is None or isinstance(layout, str):
        return plan
    return replace(plan, order=order_of((settings.curve,), layout, call.q.device), curve=settings.curve)


def _tuned_plan(call: AttentionCall, tuned: TunedParams, layer: str | None, layout: TokenLayout | str,
                impl: str) -> SparsePlan | Dense | str:
    """The plan as tuned, or why there is nothing tuned for this call."""
    setting = setting_for(tuned, layer, call)
    if isinstance(setting, str):
        return setting
    if setting is None:
        return Dense("tuned to stay dense", f"layer {layer}")
    order = order_of(setting.curves, layout, call.q.device)
    if isinstance(order, str):
        return f"an order was tuned that needs the grid of the tokens: {order}"
    # A card on which INT8 does not pay is at least as exact with fp16.
    pv_dtype = "auto" if setting.pv_dtype == "int8" else setting.pv_dtype
    curve = setting.curves[0] if len(set(setting.curves)) == 1 else "mixed"
    return SparsePlan(params_on(setting, call.q.device), impl, order, layout, setting.skipped, pv_dtype, curve,
                      needs_residual=tuned.refreshes > 0)


def plan_without_residual(plan: SparsePlan, call: AttentionCall, settings: NodeSettings,
                          site: CallSite) -> SparsePlan | Dense:
    """Whose thresholds serve a call that gets no residual: where `plan` needs one, those of the widgets."""
    if not plan.needs_residual:
        return plan
    plain = plan_call(call, replace(settings, tuned=None), site)
    return plain if isinstance(plain, Dense) else replace(plain, untuned="they were tuned for refreshes, and this call "
                                                                         "has no residual")


def not_wanted_at(q_tokens: int, k_tokens: int, settings: NodeSettings) -> Dense | None:
    """Why a call of these sizes stays dense whatever else it is; None where that depends."""
    if q_tokens != k_tokens:
        return Dense("cross-attention", f"{q_tokens} queries, {k_tokens} keys")
    if q_tokens < settings.min_tokens:
        return Dense("fewer tokens than min_tokens", f"{q_tokens} < {settings.min_tokens}")
    return None


def _not_wanted(call: AttentionCall, settings: NodeSettings, site: CallSite) -> Dense | None:
    declined = not_wanted_at(call.q_tokens, call.k_tokens, settings)
    if declined:
        return declined
    if not call.low_precision:
        return Dense("the model asks for full precision")
    if site.block is not None and site.block in settings.dense_blocks:
        return Dense("listed in dense_blocks", f"block {site.block}")
    return None


def _no_implementation_takes(call: AttentionCall) -> Dense | None:
    q, k, v, mask = call.q, call.k, call.v, call.mask
    (q_heads, k_heads), dtype, device, of_q, of_k = call.heads, q.dtype, q.device, q.shape, k.shape
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        return Dense("unsupported dtype", f"q {dtype}, k {k.dtype}, v {v.dtype}")
    if k.device != device or v.device != device or (mask is not None and mask.device != device):
        tensors = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
        return Dense("tensors on different devices", ", ".join(f"{name} {x.device}" for name, x in tensors.items()))
    if of_q[-1] > MAX_HEAD_DIM:
        return Dense("unsupported head_dim", f"{of_q[-1]} > {MAX_HEAD_DIM}")
    if of_k != v.shape or of_k[0] != of_q[0] or of_k[-1] != of_q[-1] or 0 in of_q or 0 in of_k:
        return Dense("shapes of q, k and v do not fit", f"{tuple(of_q)}, {tuple(of_k)}, {tuple(v.shape)}")
    if k_heads != q_heads and not (call.enable_gqa and q_heads % k_heads == 0):
        return Dense("unsupported numbers of heads", f"{q_heads} of q, {k_heads} of k")
    if mask is not None and call.key_mask is None:
        by_query = mask.ndim > 1 and mask.shape[-2] > 1
        return Dense("mask that differs from query to query" if by_query else "unsupported mask",
                     f"{mask.dtype} {tuple(mask.shape)}")
    if call.scale is not None and not (isinstance(call.scale, (int, float)) and math.isfinite(call.scale)):
        return Dense("unsupported scale", f"{type(call.scale).__name__}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Dense("gradients are needed")
    return None


def _implementation_here(call: AttentionCall, settings: NodeSettings) -> str | Dense:
    """The eager reference serves short sequences on a CPU; on other devices dense attention is faster than it."""
    device = call.q.device
    name, reason = select_implementation(call.q)
    if name != "reference":
        return name
    if device.type != "cpu":
        return Dense("no fast kernel", reason or "")
    if call.q_tokens > MAX_CPU_TOKENS:
        return Dense("too many tokens for the CPU", f"{call.q_tokens} > {MAX_CPU_TOKENS}")
    return name

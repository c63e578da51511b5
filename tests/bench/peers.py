"""The methods that a case compares: peers that can be imported, and this project."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention

BASELINE = "SDPA cuDNN"


@dataclass
class Method:
    """run(q, k, v) → output; gate: a key of `measure.GATES`, None for sparse peers, whose blocks are not known;
    params: the map's parameters, None for all but this project. skipped: what becomes of the other blocks, likewise."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate: str | None
    params: SpargeParams | None = None
    skipped: str = "drop"


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


cudnn = partial(sdpa, SDPBackend.CUDNN_ATTENTION)


def ours(params: SpargeParams, pv_dtype: str, **call) -> Callable:
    return lambda q, k, v: sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, impl="triton", **call)


def fixed_share(topk: float) -> SpargeParams:
    """Parameters that keep a fixed share of the blocks, whatever the blocks look like."""
    return SpargeParams(topk=topk, similarity_threshold=-1.0)


def installed_peers() -> list[Method]:
    """PyTorch's attention and the peers that can be imported."""
    found = [Method("SDPA flash", partial(sdpa, SDPBackend.FLASH_ATTENTION), "exact"), Method(BASELINE, cudnn, "exact")]
    for peer in (_flash_attn, _fa3_fwd, _comfy_kitchen, _sol_attn, _sageattention, _spas_sage_attn):
        try:
            found += peer()
        except (ImportError, OSError):  # not installed, or its binary is built for another torch
            continue
    return found


def methods() -> list[Method]:
    """The installed peers, then this project at fixed shares of kept blocks and at its defaults."""
    settings = [(f"topk {topk}", fixed_share(topk), "drop") for topk in (1.0, 0.5, 0.3, 0.2, 0.1)]
    settings += [(f"topk {topk}, pooled", fixed_share(topk), "pooled") for topk in (0.3, 0.2, 0.1)]
    settings.append(("defaults", SpargeParams(), "drop"))
    return installed_peers() + [
        Method(f"ours {pv_dtype} {label}", ours(params, pv_dtype, skipped=skipped), pv_dtype, params, skipped)
        for label, params, skipped in settings for pv_dtype in ("int8", "fp16")]


def _flash_attn() -> list[Method]:
    from flash_attn import flash_attn_func
    return [Method("flash_attn", partial(_tokens_first, flash_attn_func), "exact")]


def _fa3_fwd() -> list[Method]:
    from fa3_fwd_interface import flash_attn_func
    return [Method("FlashAttention-3", partial(_tokens_first, flash_attn_func), "exact")]


def _tokens_first(attention: Callable, q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
    """An attention function of (B, N, H, D)."""
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), **settings).transpose(1, 2)


def _comfy_kitchen() -> list[Method]:
    from comfy_kitchen import int8_attention, int8_attention_is_available
    return [Method("comfy-kitchen int8", int8_attention, "int8")] if int8_attention_is_available() else []


def _sol_attn() -> list[Method]:
    """comfy-kitchen's sparse attention, which pools what it skips: at several thresholds with and without single tokens
    beside its blocks, and at fixed shares of blocks."""
    from comfy_kitchen import sol_attn, sol_attn_is_available
    settings = {f"τ={tau}, {tokens} tokens": dict(tau=tau, token_aug=tokens)
                for tau, tokens in ((0.7, 256), (1.0, 256), (1.3, 256), (2.0, 256), (1.3, 0))}
    settings |= {f"topk {topk}": dict(topk_ratio=topk) for topk in (0.3, 0.2, 0.1)}
    if not sol_attn_is_available():
        settings = {}
    return [Method(f"sol_attn {name}", partial(_tokens_first, sol_attn, **each), None)
            for name, each in settings.items()]


def _sageattention() -> list[Method]:
    from sageattention import sageattn
    return [Method("SageAttention", partial(sageattn, tensor_layout="HND"), "fp8")]


def _spas_sage_attn() -> list[Method]:
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as attention
    return [Method(f"SpargeAttn topk {topk}", partial(attention, topk=topk), None) for topk in (0.5, 0.3, 0.1)]

"""Calls that between them need every switch and every optional tensor of the kernels, for the scripts that compile."""
from dataclasses import replace

import torch

from comfyui_spargeattn.kernels import Residual
from comfyui_spargeattn.kernels._triton import pipeline
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds

TOKENS = 256
FORMATS = "fp16", "int8"


def variants() -> dict[str, tuple[CallSpec, str]]:
    """Name → a call, and its residual: none, made from an earlier one, or added and then beside a log-sum-exp."""
    never = float("inf")
    cdf, topk = (Thresholds(selection, (0.9, 0.5, never)) for selection in ("cdf", "topk"))
    skipping, all_blocks = (Thresholds("cdf", (amount, 0.5, 10.0)) for amount in (0.9, 1.0))
    bias, order = torch.zeros(1, TOKENS), torch.arange(TOKENS, dtype=torch.int32)
    return {
        "plain": (CallSpec(cdf), "none"),
        "pooled tail": (CallSpec(topk, skipped="pooled"), "none"),
        "pooled tail, bias": (CallSpec(topk, skipped="pooled", key_bias=bias), "none"),
        "causal, padding": (CallSpec(cdf, causal=True, key_padding_mask=bias.bool()), "none"),
        "λ test, order": (CallSpec(skipping, order=order), "none"),
        "residual, log-sum-exp": (CallSpec(cdf), "added"),
        "residual made": (CallSpec(cdf), "made"),
        "everything": (CallSpec(all_blocks, causal=True, skipped="pooled", key_bias=bias, order=order), "added"),
    }


def run(dim: int, dtype: torch.dtype, pv_dtype: str, call: CallSpec, residual: str) -> None:
    """A call from `variants` on q, k and v of a head_dim, with a format of P·V."""
    q = torch.zeros(1, 2, TOKENS, dim, dtype=dtype)
    out, call = torch.empty_like(q), replace(call, pv_dtype=pv_dtype, return_stats=True)
    if residual == "made":
        pipeline.residual(q, q, q, out, replace(call, residual=Residual.empty(q.shape, q.device), lead=0.5))
    elif residual == "added":
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        pipeline.attention(q, q, q, out, lse, replace(call, residual=Residual.empty(q.shape, q.device)))
    else:
        pipeline.attention(q, q, q, out, None, call)

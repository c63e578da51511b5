"""Dense attention, computed exactly."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
                    key_padding_mask: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
    """Exact attention in float64, by query chunks: what every other path is measured against.

    q (B, H, Nq, D), k and v (B, Hkv, Nk, D), any floating dtype → float64 (B, H, Nq, D). `key_padding_mask` is bool
    (B, Nk), True where a key is padding; `key_bias`, (B, Nk), is added to the scores of a key. A row with no visible
    key gives zeros.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = (x.double() if group == 1 else x.double().repeat_interleave(group, 1) for x in (k, v))
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64, device=q.device)
    keys = torch.arange(k.shape[2], device=q.device)
    hidden = torch.zeros(len(q), 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None]
    if key_bias is not None:
        hidden = hidden | (key_bias == -math.inf)[:, None, None]
    for start in range(0, q.shape[2], 1024):
        scores = q[:, :, start:start + 1024].double() @ k.mT * scale
        if key_bias is not None:
            scores = scores + key_bias[:, None, None].double()
        unseen = hidden
        if causal:
            rows = torch.arange(start, start + scores.shape[2], device=q.device)
            unseen = hidden | (keys > rows[:, None])
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        out[:, :, start:start + 1024] = weights.masked_fill(unseen.all(-1, keepdim=True), 0.0) @ v
    return out

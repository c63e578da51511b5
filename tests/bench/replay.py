"""Replay one attention call with many settings: by the package's call, or exactly and all settings at once."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds
from comfyui_spargeattn.kernels.reference import BLOCK, Visibility, in_blocks, predict_map, visibility

TAILS = "drop", "pooled"


@dataclass(frozen=True)
class Call:
    """One attention call of a model.

    q: (1, H, N, D); k, v: (1, Hkv, N, D).
    grid: (T, H, W) of its visual tokens, None where it has none.
    before: so many first tokens are no visual ones, and their blocks are always attended: the package's own callers
        do so with text, and with the first four tokens of a text.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    grid: tuple[int, int, int] | None = None
    before: int = 0

    @property
    def sinks(self) -> list[tuple[int, int]]:
        """Ranges of tokens that are always attended."""
        return [(0, self.before)] if self.before else []


@dataclass(frozen=True)
class Errors:
    """What settings cost and gave, by head: kept (S, H), L1 (S, 2, H) in the order of `TAILS`."""

    kept: Tensor
    l1: Tensor


def dense(call: Call) -> Tensor:
    """PyTorch's attention of the call, (1, H, N, D)."""
    return F.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=call.causal, enable_gqa=True)


def by_kernels(call: Call, order: Tensor | None, settings: list[SpargeParams], impl: str = "auto") -> Errors:
    """Call the package for each setting and tail."""
    exact = dense(call).float()
    kept, l1 = [], []
    for params in settings:
        for tail in TAILS:
            out, stats = sparge_attention(call.q, call.k, call.v, params=params, causal=call.causal, order=order,
                                          sink_keys=call.sinks, skipped=tail, impl=impl, return_stats=True)
            l1.append((out.float() - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3)))
        kept.append(stats.kept[0])
    return Errors(torch.stack(kept).cpu(), torch.stack(l1).unflatten(0, (-1, len(TAILS))).cpu())


def exactly(call: Call, order: Tensor | None, settings: list[SpargeParams], every: int = 1) -> Errors:
    """What the reference computes for all settings, in one pass over the scores.

    A block of keys contributes the same sums Σ p·v and Σ p to a row under every map that keeps it. They are made once,
    and each setting adds up those of its map. The maps are the reference's. Every `every`-th block of queries counts.
    """
    specs = [CallSpec(Thresholds.of(params, call.q.device), causal=call.causal, order=order, sink_keys=call.sinks)
             for params in settings]
    queries, keys, values = in_blocks(call.q, call.k, call.v, specs[0], BLOCK)
    rules = visibility(call.q.shape[2], keys, BLOCK, call.causal)
    sample = slice(every // 2, None, every)
    queries = queries.map(lambda x: x[:, :, sample])
    rules = Visibility(rules.visible[:, :, sample], rules.partial[:, :, sample])
    scale = specs[0].scale_for(call.q.shape[3])
    maps = torch.stack([predict_map(queries, keys, rules, spec.thresholds, scale)[0] for spec in specs], 1)  # [H, S, …]
    visible = rules.visible[0].expand(maps.shape[0], -1, -1)  # [H, q_blocks, k_blocks]
    valid, counts = keys.valid[0], keys.valid[0].sum(-1)
    means = values[0].sum(2) / counts[..., None]  # [H, k_blocks, D]
    tokens = torch.arange(valid[0].numel(), device=call.q.device)
    errors, size = 0.0, 0.0
    for i in range(maps.shape[2]):
        start = (every // 2 + i * every) * BLOCK.q
        rows = tokens[start:min(start + BLOCK.q, call.q.shape[2])]
        q = queries.tokens[0, :, i, :len(rows)] * scale
        scores = (q @ keys.tokens[0].flatten(1, 2).mT).masked_fill_(~valid.flatten(1)[:, None], -torch.inf)
        if call.causal:
            scores.masked_fill_(tokens > rows[:, None], -torch.inf)
        top = scores.amax(-1, keepdim=True)
        p = (scores - top).exp_().unflatten(-1, valid.shape[1:]).transpose(1, 2)  # [H, k_blocks, rows, b_k]
        whole, whole_weight = p @ values[0], p.sum(-1)  # [H, k_blocks, rows, D], [H, k_blocks, rows]
        tail_weight = ((q @ keys.mean[0].mT - top).exp_() * counts[:, None]).mT
        tail_weight.masked_fill_(~visible[:, i, :, None], 0.0)  # what lies ahead of a causal row may exceed its top
        tail = tail_weight[..., None] * means[:, :, None]
        seen = visible[:, None, i].to(q.dtype)
        exact = _total(seen, whole) / _total(seen, whole_weight)[..., None]
        chosen = maps[:, :, i].to(q.dtype)  # [H, S, k_blocks]
        sums, weights = _total(chosen, whole), _total(chosen, whole_weight)
        dropped = _distance(sums, weights, exact)
        sums += _total(seen - chosen, tail)
        weights += _total(seen - chosen, tail_weight)
        errors += torch.stack([dropped, _distance(sums, weights, exact)], 1)  # [H, 2, S]
        size += exact.abs().sum((-3, -2, -1))
    share = maps.sum((-2, -1)) / visible.sum((-2, -1))[:, None]
    return Errors(share.T.cpu(), (errors / size[:, None, None]).permute(2, 1, 0).cpu())


def _total(chosen: Tensor, parts: Tensor) -> Tensor:
    """The sum of the chosen blocks' parts: (H, S, k_blocks), (H, k_blocks, ...) → (H, S, ...)."""
    return (chosen @ parts.flatten(2)).unflatten(-1, parts.shape[2:])


def _distance(sums: Tensor, weights: Tensor, exact: Tensor) -> Tensor:
    """Σ|sums / weights - exact| of (H, S, rows, D) → (H, S). Rows without weight are zero."""
    out = sums / weights.clamp(min=torch.finfo(weights.dtype).tiny)[..., None]
    return torch.linalg.vector_norm(out.sub_(exact), 1, (-2, -1))

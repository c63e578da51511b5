"""SpargeAttn in plain PyTorch: the oracle of the kernels, the path of devices without them, the benchmarks' baseline.

Everything is written for one layout, q (B, H, Nq, D) and k, v (B, Hkv, Nk, D), and follows the paper
(arXiv 2502.18137) step by step: `compress` (3.2), `predict_map` (3.3, 3.6), `attend` (3.4, 3.5). Arithmetic is float64
where the inputs are, float32 otherwise. Sections below refer to the paper.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import FP8_MAX, HIDDEN, INT8_MAX, LOG2E, ROW_GROUP
from .types import BlockMap, BlockShape, SpargeParams, SpargeStats, TokenRanges

BLOCK = BlockShape(128, 64)


def centred_bias(bias: Tensor, padding: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The bias of keys (B, N) in log2 units with 0 as the largest of a row, and bool (B, N), which keys to ignore.

    What all keys of a row share, softmax ignores. A query of causal attention may see none of the largest.
    """
    seen = bias if padding is None else bias.masked_fill(padding, -math.inf)
    largest = seen.amax(1, keepdim=True).clamp(min=torch.finfo(bias.dtype).min)
    bias = (bias - largest) * LOG2E
    hidden = bias == -math.inf if causal else bias <= HIDDEN
    return bias, hidden if padding is None else hidden | padding


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
                    key_padding_mask: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
    """Exact attention in float64, by query chunks: what every other path is measured against.

    q (B, H, Nq, D), k and v (B, Hkv, Nk, D), any floating dtype → float64 (B, H, Nq, D). `key_padding_mask` is bool
    (B, Nk), True where a key is padding; `key_bias`, (B, Nk), is added to the scores of a key. A row with no visible
    key gives zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (_expand_groups(x.double(), q.shape[1]) for x in (k, v))
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


def sparge_attention(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams = SpargeParams(),
                     scale: float | None = None, causal: bool = False, key_padding_mask: Tensor | None = None,
                     order: Tensor | None = None, sink_keys: TokenRanges | None = None,
                     dense_queries: TokenRanges | None = None, skipped: str = "drop", block: BlockShape = BLOCK,
                     quantise: str | None = None, block_mask: Tensor | None = None, key_bias: Tensor | None = None,
                     ) -> tuple[Tensor, BlockMap, SpargeStats]:
    """SpargeAttn of q (B, H, Nq, D), k and v (B, Hkv, Nk, D) → output like q, the block map, the statistics.

    The arguments are those of `kernels.sparge_attention`, checked there. `quantise` emulates the fast kernels'
    number formats: None computes exactly, "fp16" and "fp8" round Q and K to INT8 and P and V to that format.
    `block_mask`, bool (B or 1, H or 1, nq, nk), takes the place of the predicted map.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n_q, n_k, heads = q.shape[2], k.shape[2], q.shape[1]
    order_k = None if order is None else order.long().expand(k.shape[1], n_k)
    order_q = None if order is None else order_k.repeat_interleave(heads // k.shape[1], 0)
    bias, padding = None, key_padding_mask
    if key_bias is not None:
        bias, padding = centred_bias(key_bias.float(), padding, causal)
        bias = bias.to(dtype)
    bias, padding = (None if x is None else x[:, None].expand(-1, k.shape[1], -1) for x in (bias, padding))
    if padding is not None:  # a padding token may hold anything, NaN included
        k, v = (x.masked_fill(padding[..., None], 0.0) for x in (k, v))

    queries = compress(_reorder(q, order_q).to(dtype), block.q, flags=_flags(dense_queries, order_q, heads, q))
    keys = compress(_reorder(k, order_k).to(dtype), block.k, flags=_flags(sink_keys, order_k, k.shape[1], k),
                    padding=_reorder(padding, order_k), bias=_reorder(bias, order_k), centre=True)
    keys = keys.map(lambda x: _expand_groups(x, heads))
    value = _blocks(_expand_groups(_reorder(v, order_k).to(dtype), heads), block.k)

    rules = visibility(n_q, keys, block, causal)
    if block_mask is None:
        mask = predict_map(queries, keys, rules, params, scale)
        broken = ~value.isfinite().flatten(3).all(-1)
        mask = mask | rules.visible & broken[:, :, None]  # their rows are NaN, as dense attention's would be
    else:
        mask = block_mask & rules.visible.expand(q.shape[0], heads, -1, -1)
    out, pv_skipped = attend(queries, keys, value, mask, rules, params, scale, skipped, quantise,
                             causal, n_q)
    if order_q is not None:
        out = torch.empty_like(out).scatter_(2, order_q[None, :, :, None].expand_as(out), out)
    stats = SpargeStats((mask.sum((-2, -1)) / rules.visible.sum((-2, -1)).clamp(min=1)).float(), pv_skipped)
    return out.to(q.dtype), BlockMap.from_mask(mask, block), stats


@dataclass
class Compressed:
    """A sequence cut into blocks of b tokens, with what stands for each block (3.2).

    tokens (B, H, n, b, D), zero past the end; valid bool (B, H, n, b); mean (B, H, n, D) over the valid tokens;
    similarity (B, H, n), the mean cosine over all pairs of valid tokens; always bool (1 or B, H, n), blocks that
    hold a token the caller wants exact; bias (B, H, n, b), added to scores in log2 units, zero where not valid.
    """

    tokens: Tensor
    valid: Tensor
    mean: Tensor
    similarity: Tensor
    always: Tensor
    bias: Tensor

    @property
    def mean_bias(self) -> Tensor:
        """(B, H, n), over the valid tokens."""
        return self.bias.sum(-1) / self.valid.sum(-1).clamp(min=1)

    def map(self, function) -> Compressed:
        return Compressed(*(function(getattr(self, name)) for name in self.__dataclass_fields__))


def compress(x: Tensor, block: int, *, flags: Tensor, padding: Tensor | None = None, bias: Tensor | None = None,
             centre: bool = False) -> Compressed:
    """Block means and self-similarity of x (B, H, N, D); `centre` subtracts the sequence mean first.

    flags: bool (H, N), tokens that make their block exact. padding: bool (B, H, N), tokens that do not exist. bias:
    (B, H, N), added to the scores of a token, in log2 units.
    """
    valid = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if padding is None else ~padding
    if centre:
        total = (x * valid[..., None]).sum(2, keepdim=True)
        x = x - total / valid.sum(2, keepdim=True).clamp(min=1)[..., None]
    tokens = _blocks(x * valid[..., None], block)
    valid = _blocks(valid[..., None], block)[..., 0]
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    # The mean of the full Gram matrix of the unit rows is the squared length of their mean.
    unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    similarity = (unit.sum(-2) / count).square().sum(-1)
    always = _blocks(flags[None, ..., None], block)[..., 0].any(-1)
    bias = torch.zeros_like(tokens[..., 0]) if bias is None else _blocks(bias[..., None], block)[..., 0]
    return Compressed(tokens, valid, tokens.sum(-2) / count, similarity, always, bias.where(valid, 0.0))


@dataclass
class Visibility:
    """visible, partial: bool (B or 1, H or 1, nq, nk); partial blocks are cut by the causal diagonal."""

    visible: Tensor
    partial: Tensor


def visibility(n_q: int, keys: Compressed, block: BlockShape, causal: bool) -> Visibility:
    """Which block pairs have anything to attend, and which of them only in part."""
    visible = keys.valid.any(-1)[:, :, None].expand(-1, -1, -(-n_q // block.q), -1)
    if not causal:
        return Visibility(visible, torch.zeros_like(visible))
    nq, nk = visible.shape[-2:]
    first_row = torch.arange(nq, device=visible.device)[:, None] * block.q
    last_row = (first_row + block.q - 1).clamp(max=n_q - 1)
    first_key = torch.arange(nk, device=visible.device) * block.k
    reached = visible & (first_key <= last_row)
    return Visibility(reached, reached & (first_key + block.k - 1 > first_row))


def predict_map(queries: Compressed, keys: Compressed, rules: Visibility, params: SpargeParams,
                scale: float) -> Tensor:
    """The block map, bool (B, H, nq, nk) (3.3).

    Blocks kept by rule (dissimilar, sink, on the causal diagonal) take no part in the softmax; TopCdf or TopK chooses
    among the others; equal scores are chosen together. Similarity is judged for TopCdf alone: TopK keeps a fixed share.
    Blocks that hold NaN or infinity are kept.
    """
    amount = _per_head(params.amount, queries.mean, 4)
    theta = _per_head(params.similarity_threshold if params.selection == "cdf" else -1.0, queries.mean, 4)
    always_keys = keys.always[:, :, None] | ~(keys.similarity[:, :, None] >= theta) | keys.mean_bias.isnan()[:, :, None]
    always_rows = queries.always[..., None] | ~(queries.similarity[..., None] >= theta)
    ruled = rules.partial | always_keys.expand_as(rules.visible)
    judged = rules.visible & ~ruled & ~always_rows
    scores = queries.mean @ keys.mean.mT * scale + keys.mean_bias[:, :, None] / LOG2E
    scores = scores.masked_fill(~judged, -math.inf)
    ranked = scores.sort(dim=-1, descending=True).values
    if params.selection == "cdf":
        weight, target = ranked.softmax(-1).nan_to_num(0.0), amount
    else:
        weight = (ranked > -math.inf).to(ranked.dtype)
        target = (amount * rules.visible.sum(-1, keepdim=True) - 1e-3).ceil().minimum(weight.sum(-1, keepdim=True))
    last = (weight.cumsum(-1) < target).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    threshold = torch.where(amount >= 1, -math.inf, ranked.gather(-1, last))
    chosen = judged & (scores >= threshold)
    return rules.visible & (chosen | ruled | always_rows)


def attend(queries: Compressed, keys: Compressed, value: Tensor, mask: Tensor, rules: Visibility,
           params: SpargeParams, scale: float, skipped: str, quantise: str | None, causal: bool,
           n_q: int) -> tuple[Tensor, Tensor]:
    """Block-sparse online softmax over the kept blocks (3.4, 3.5), one query block of all heads at a time.

    value (B, H, nk, b_k, D). Returns the output (B, H, Nq, D) in blocking order and pv_skipped (B, H).
    """
    batch, heads, nq, block_q, _ = queries.tokens.shape
    q, k, v, rounding = queries.tokens * (scale * LOG2E), keys.tokens, value, None
    v_centre, v_scale = v.new_zeros(1, 1, 1, 1, 1), v.new_ones(1, 1, 1, 1, 1)
    if quantise is not None:
        q, k = _int8(q, dims=(-1,)), _int8(k, dims=(-2, -1))
        rounding = _to_fp8 if quantise == "fp8" else _to_fp16
        # What is subtracted from every value comes back at the end, because the weights of a row sum to one.
        valid = keys.valid[..., None]
        v_centre = v.sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True).clamp(min=1)
        value = (v - v_centre) * valid
        v_scale = value.abs().amax((2, 3), keepdim=True).clamp(min=1e-12) / (FP8_MAX if quantise == "fp8" else 1.0)
        v = rounding(value / v_scale)
    # P is at most 1 and is stretched over the format's range; the factor cancels in the quotient.
    p_scale = FP8_MAX if quantise == "fp8" else 1.0
    k_flat, v_flat, valid = k.flatten(2, 3), v.flatten(2, 3), keys.valid.flatten(2, 3)
    pv_limit = _per_head(params.pv_threshold, q, 4)
    tokens = torch.arange(k_flat.shape[2], device=q.device)
    out, skips = [], torch.zeros(batch, heads, device=q.device)
    for i in range(nq):
        rows = torch.arange(i * block_q, (i + 1) * block_q, device=q.device)
        allowed = valid[:, :, None] & mask[:, :, i].repeat_interleave(v.shape[3], -1)[:, :, None]
        if causal:
            allowed = allowed & (tokens <= rows[:, None])
        x = q[:, :, i] @ k_flat.mT + keys.bias.flatten(2)[:, :, None]  # [B, H, b_q, nk·b_k], log2 units
        x = x.masked_fill(~allowed, -math.inf)
        local = x.unflatten(-1, (-1, v.shape[3])).amax(-1)  # row maximum of each block
        running = local.cummax(-1).values.clamp(min=torch.finfo(x.dtype).min)
        top = running[..., -1:]
        tail = None
        if skipped == "pooled":
            tail = _tail_scores(q[:, :, i], keys, mask[:, :, i], rules.visible[:, :, i], quantise is not None)
            top = torch.maximum(top, tail.amax(-1, keepdim=True))
        p = (x - top).exp2()
        total = p.sum(-1, keepdim=True)
        if rounding is not None:  # rounded against the running maximum, as an online softmax meets it
            shift = running.repeat_interleave(v.shape[3], -1)
            p = rounding((x - shift).exp2() * p_scale) / p_scale * (shift - top).exp2()
        skip = _skipped_groups(local, running, pv_limit)
        skips += (skip & mask[:, :, i][:, :, None]).sum((-2, -1))
        p = p.unflatten(-1, (-1, v.shape[3])) * ~skip.repeat_interleave(ROW_GROUP, 2)[..., None]
        acc = p.flatten(-2) @ v_flat
        if tail is not None:
            p = (tail - top).exp2()
            total = total + p.sum(-1, keepdim=True)
            acc = acc + p @ (value.sum(3) / keys.valid.sum(-1, keepdim=True).clamp(min=1) / v_scale[:, :, 0])
        out.append(torch.where(total == 0, 0.0, acc / total * v_scale[:, :, 0] + v_centre[:, :, 0]))
    groups = mask.sum((-2, -1)) * (block_q // ROW_GROUP)
    return torch.cat(out, 2)[:, :, :n_q], (skips / groups.clamp(min=1)).float()


def _skipped_groups(local: Tensor, running: Tensor, limit: Tensor) -> Tensor:
    """The λ test (3.5): bool (B, H, b_q / ROW_GROUP, nk), groups whose probabilities are all below 2^-limit."""
    below = (local - running).unflatten(2, (-1, ROW_GROUP)).amax(3)
    return below < -limit


def _tail_scores(q: Tensor, keys: Compressed, kept: Tensor, visible: Tensor, rounded: bool) -> Tensor:
    """Scores (B, H, b_q, nk) of the pooled tail: each skipped block as one key, counted once per valid token."""
    weight = keys.valid.sum(-1).clamp(min=1).to(q.dtype).log2() + keys.mean_bias
    scores = q @ keys.mean.mT + (_to_fp16(weight) if rounded else weight)[:, :, None]
    return scores.masked_fill(~(visible & ~kept)[:, :, None], -math.inf)


def _int8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Symmetric INT8 rounding with one scale over `dims`."""
    step = x.abs().amax(dims, keepdim=True).clamp(min=1e-12) / INT8_MAX
    return (x / step + 0.5).floor() * step


def _to_fp8(x: Tensor) -> Tensor:
    return x.float().to(torch.float8_e4m3fn).to(x.dtype)


def _to_fp16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) → (B, H, n, block, D), zero-padded."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _reorder(x: Tensor | None, order: Tensor | None) -> Tensor | None:
    """Tokens of x (B, H, N, ...) in the order (H, N)."""
    if x is None or order is None:
        return x
    index = order[None].reshape(1, *order.shape, *[1] * (x.ndim - 3)).expand(x.shape[0], *order.shape, *x.shape[3:])
    return x.gather(2, index)


def _flags(ranges: TokenRanges | None, order: Tensor | None, heads: int, x: Tensor) -> Tensor:
    """bool (heads, N) in blocking order, True inside the caller's token ranges."""
    flags = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
    for start, stop in ranges or ():
        flags[start:stop] = True
    return flags.expand(heads, -1) if order is None else flags[order]


def _expand_groups(x: Tensor, heads: int) -> Tensor:
    """Repeat the key heads (dimension 1) of grouped-query attention up to the query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _per_head(value: float | Tensor, like: Tensor, ndim: int) -> Tensor:
    """A threshold as a tensor that broadcasts over (B, H, ...) of `ndim` dimensions."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(1, -1, *[1] * (ndim - 2))

"""SpargeAttn in plain PyTorch: the oracle of the kernels, the path of devices without them.

Tensors are q (B, H, Nq, D) and k, v (B, Hkv, Nk, D). The code follows the paper (arXiv 2502.18137) step by step:
`compress` (3.2), `predict_map` (3.3, 3.6), `attend` (3.4, 3.5). Arithmetic is float64 where the inputs are, float32
otherwise. Sections below refer to the paper.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import CallSpec, Thresholds
from .capability import pv_format
from .formats import FLOAT16_LIMIT, INT8_LIMIT, INT8_MAX, LEAST_SPREAD, LOG2E, ROW_GROUP
from .types import BlockMap, BlockShape, Residual, SpargeStats, Threshold, TokenRanges

BLOCK = BlockShape(128, 64)


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, call: CallSpec) -> SpargeStats | None:
    """Write `sparge_attention` into out like q, and the log-sum-exp into lse; the statistics if asked."""
    result, sums, _, stats = with_lse(q, k, v, call)
    out.copy_(result)
    if lse is not None:
        lse.copy_(sums)
    return stats if call.return_stats else None


def residual(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, call: CallSpec) -> Residual:
    """What `dense` (B, H, Nq, D), attention of the same tensors, has beyond `sparge_attention`, or where the line to it
    from the earlier residual of the call leads."""
    wide = torch.promote_types(q.dtype, torch.float32)  # a rounded result would differ by more than it lacks
    result, *_ = sparge_attention(q.to(wide), k.to(wide), v.to(wide), replace(call, residual=None))
    lacking, earlier = dense - result, call.residual
    return Residual.of(lacking if earlier is None else lacking + call.lead * (lacking - earlier.tensor()))


def predict(q: Tensor, k: Tensor, call: CallSpec) -> BlockMap:
    """The block map alone."""
    queries, keys, values = in_blocks(q, k, k, call, BLOCK)
    rules = visibility(q.shape[2], keys, BLOCK, call.causal)
    return BlockMap.from_mask(_map_of(queries, keys, values, rules, call), BLOCK)


def block_of(q: Tensor, pv_dtype: str) -> BlockShape:
    """The block shape of every call."""
    return BLOCK


def sparge_attention(q: Tensor, k: Tensor, v: Tensor, call: CallSpec,
                     block: BlockShape = BLOCK) -> tuple[Tensor, BlockMap, SpargeStats]:
    """SpargeAttn of q (B, H, Nq, D), k and v (B, Hkv, Nk, D) → output like q, the block map, the statistics."""
    out, _, block_map, stats = with_lse(q, k, v, call, block)
    return out, block_map, stats


def with_lse(q: Tensor, k: Tensor, v: Tensor, call: CallSpec,
             block: BlockShape = BLOCK) -> tuple[Tensor, Tensor, BlockMap, SpargeStats]:
    """`sparge_attention` with the log-sum-exp (B, H, Nq) of the scores behind the output.

    With pv_dtype "auto" it computes exactly; "int8" and "fp16" emulate the number formats of the fast kernels: Q and K
    are rounded to INT8, P and V to that format.
    """
    call.check_blocks(block, q.shape[2], k.shape[2])
    queries, keys, values = in_blocks(q, k, v, call, block)
    rules = visibility(q.shape[2], keys, block, call.causal)
    mask = _map_of(queries, keys, values, rules, call)
    out, lse, pv_skipped = attend(queries, keys, values, mask, rules, call)
    out, lse = out[:, :, :q.shape[2]], lse[:, :, :q.shape[2]]
    if call.order is not None:
        order = _order_by_head(call.order, q.shape[1], k.shape[1])
        out = torch.empty_like(out).scatter_(2, order[None, :, :, None].expand_as(out), out)
        lse = torch.empty_like(lse).scatter_(2, order[None].expand_as(lse), lse)
    lse = lse / LOG2E + call.shared_score(q, keys.centre[:, :, 0])
    if call.residual is not None:
        out = out + call.residual.tensor()
    stats = SpargeStats((mask.sum((-2, -1)) / rules.visible.sum((-2, -1)).clamp(min=1)).float(), pv_skipped)
    return out.to(q.dtype), lse, BlockMap.from_mask(mask, block), stats


@dataclass
class Compressed:
    """A sequence cut into blocks of b tokens, with what stands for each block (3.2).

    tokens: (B, H, n, b, D), zero past the end.
    valid: bool (B, H, n, b), tokens that exist and are no padding.
    mean: (B, H, n, D), over the valid tokens.
    similarity: (B, H, n), the mean cosine over all pairs of valid tokens.
    always: bool (1 or B, H, n), blocks that hold a token that the caller wants exact.
    bias: (B, H, n, b), added to scores in log2 units, zero where not valid.
    centre: (B, H, 1, D), what was subtracted from every token.
    """

    tokens: Tensor
    valid: Tensor
    mean: Tensor
    similarity: Tensor
    always: Tensor
    bias: Tensor
    centre: Tensor

    @property
    def mean_bias(self) -> Tensor:
        """(B, H, n), over the valid tokens."""
        return self.bias.sum(-1) / self.valid.sum(-1).clamp(min=1)

    def map(self, function) -> Compressed:
        return Compressed(*(function(getattr(self, name)) for name in self.__dataclass_fields__))


def in_blocks(q: Tensor, k: Tensor, v: Tensor, call: CallSpec,
              block: BlockShape) -> tuple[Compressed, Compressed, Tensor]:
    """Q and K of a call, compressed, and V (B, H, k_blocks, b_k, D), in blocking order and with a head for each of Q's.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, kv_heads = q.shape[1], k.shape[1]
    order_q = order_k = None
    if call.order is not None:
        order_q, order_k = (_order_by_head(call.order, n, kv_heads) for n in (heads, kv_heads))
    bias, padding = call.bias_and_padding()
    if bias is not None:
        bias = _reorder(bias.to(dtype)[:, None].expand(-1, kv_heads, -1), order_k)
    if padding is not None:
        padding = padding[:, None].expand(-1, kv_heads, -1)
        k, v = (x.masked_fill(padding[..., None], 0.0) for x in (k, v))  # a padding token may hold anything, NaN too
        padding = _reorder(padding, order_k)

    queries = compress(_reorder(q, order_q).to(dtype), block.q, flags=_flags(call.dense_queries, order_q, heads, q))
    keys = compress(_reorder(k, order_k).to(dtype), block.k, flags=_flags(call.sink_keys, order_k, kv_heads, k),
                    padding=padding, bias=bias, centre=True)
    values = _blocks(_expand_groups(_reorder(v, order_k).to(dtype), heads), block.k)
    return queries, keys.map(lambda x: _expand_groups(x, heads)), values


def compress(x: Tensor, block: int, *, flags: Tensor, padding: Tensor | None = None, bias: Tensor | None = None,
             centre: bool = False) -> Compressed:
    """Block means and self-similarity of x (B, H, N, D); `centre` subtracts the sequence mean first.

    flags: bool (H, N), tokens that make their block exact. padding: bool (B, H, N), tokens that do not exist. bias:
    (B, H, N), added to the scores of a token, in log2 units.
    """
    valid = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if padding is None else ~padding
    mean = torch.zeros_like(x[:, :, :1])
    if centre:
        mean = (x * valid[..., None]).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)[..., None]
        x = x - mean
    tokens = _blocks(x * valid[..., None], block)
    valid = _blocks(valid[..., None], block)[..., 0]
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    # The mean of the full Gram matrix of the unit rows is the squared length of their mean.
    unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    similarity = (unit.sum(-2) / count).square().sum(-1)
    always = _blocks(flags[None, ..., None], block)[..., 0].any(-1)
    bias = torch.zeros_like(tokens[..., 0]) if bias is None else _blocks(bias[..., None], block)[..., 0]
    return Compressed(tokens, valid, tokens.sum(-2) / count, similarity, always, bias.where(valid, 0.0), mean)


@dataclass
class Visibility:
    """Which block pairs have anything to attend.

    visible: bool (B or 1, H or 1, q_blocks, k_blocks).
    partial: bool like visible, pairs that the causal diagonal cuts.
    """

    visible: Tensor
    partial: Tensor


def visibility(q_tokens: int, keys: Compressed, block: BlockShape, causal: bool) -> Visibility:
    """Which block pairs have anything to attend, and which of them only in part."""
    visible = keys.valid.any(-1)[:, :, None].expand(-1, -1, -(-q_tokens // block.q), -1)
    if not causal:
        return Visibility(visible, torch.zeros_like(visible))
    q_blocks, k_blocks = visible.shape[-2:]
    first_row = torch.arange(q_blocks, device=visible.device)[:, None] * block.q
    last_row = (first_row + block.q - 1).clamp(max=q_tokens - 1)
    first_key = torch.arange(k_blocks, device=visible.device) * block.k
    reached = visible & (first_key <= last_row)
    return Visibility(reached, reached & (first_key + block.k - 1 > first_row))


def predict_map(queries: Compressed, keys: Compressed, rules: Visibility, thresholds: Thresholds,
                scale: float) -> Tensor:
    """The block map, bool (B, H, q_blocks, k_blocks) (3.3).

    Blocks kept by rule (dissimilar, sink, on the causal diagonal) take no part in the softmax; TopCdf or TopK chooses
    among the others; equal scores are chosen together. Similarity is judged for TopCdf alone: TopK keeps a fixed share.
    Blocks that hold NaN or infinity are kept.
    """
    judges = thresholds.selection == "cdf"
    amount = _per_head(thresholds.amount, queries.mean, 4)
    theta = _per_head(thresholds.similarity_threshold if judges else -1.0, queries.mean, 4)
    always_keys = keys.always[:, :, None] | ~(keys.similarity[:, :, None] >= theta) | keys.mean_bias.isnan()[:, :, None]
    always_rows = queries.always[..., None] | ~(queries.similarity[..., None] >= theta)
    ruled = rules.partial | always_keys.expand_as(rules.visible)
    judged = rules.visible & ~ruled & ~always_rows
    scores = queries.mean @ keys.mean.mT * scale + keys.mean_bias[:, :, None] / LOG2E
    scores = scores.masked_fill(~judged, -math.inf)
    ranked = scores.sort(dim=-1, descending=True).values
    if judges:
        weight, target = ranked.softmax(-1).nan_to_num(0.0), amount
    else:
        weight = (ranked > -math.inf).to(ranked.dtype)
        target = (amount * rules.visible.sum(-1, keepdim=True) - 1e-3).ceil().minimum(weight.sum(-1, keepdim=True))
    last = (weight.cumsum(-1) < target).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    threshold = torch.where(amount >= 1, -math.inf, ranked.gather(-1, last))
    chosen = judged & (scores >= threshold)
    return rules.visible & (chosen | ruled | always_rows)


def _map_of(queries: Compressed, keys: Compressed, values: Tensor, rules: Visibility, call: CallSpec) -> Tensor:
    """The map of a call, bool (B, H, q_blocks, k_blocks): the given one where there is something to attend, or the
    predicted one with the blocks whose values are not finite: dense attention would make their rows NaN too."""
    if call.block_mask is not None:
        return call.block_mask & rules.visible.expand(*queries.mean.shape[:2], -1, -1)
    mask = predict_map(queries, keys, rules, call.thresholds, call.scale_for(queries.mean.shape[-1]))
    broken = ~values.isfinite().flatten(3).all(-1)
    return mask | rules.visible & broken[:, :, None]


def attend(queries: Compressed, keys: Compressed, values: Tensor, mask: Tensor, rules: Visibility,
           call: CallSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Block-sparse online softmax over the kept blocks (3.4, 3.5), one query block of all heads at a time.

    values (B, H, k_blocks, b_k, D). Returns the output (B, H, q_blocks · b_q, D) and the log-sum-exp
    (B, H, q_blocks · b_q) in log2 units, both in blocking order, and pv_skipped (B, H).
    """
    batch, heads, q_blocks, block_q, dim = queries.tokens.shape
    block_k = values.shape[3]
    q, k, v, v_scale, v_centre = queries.tokens, keys.tokens, values, 1.0, 0.0
    emulated = call.pv_dtype != "auto"
    in_int8 = emulated and pv_format(call.pv_dtype, None, q.shape[-1]) == "int8"
    if emulated:
        groups = call.mixing_groups(dim)
        q, k = (_mixed(_int8(_mixed(x, groups), dims), groups) for x, dims in ((q, (-1,)), (k, (-2, -1))))
        # What is subtracted from every value comes back at the end, because the weights of a row sum to one.
        v_centre, spread = _centre_and_spread(v, keys.valid)
        values = (v - v_centre) * keys.valid[..., None]
        v_scale = _scale_of(spread)
        v = values / v_scale
        largest = v.abs().amax((-2, -1), keepdim=True)  # of a block
        if in_int8:
            v = torch.where(largest > INT8_LIMIT, _int8(v, dims=(-2,)), _int8(v, dims=(-2, -1)))
        else:
            block_scale = (largest / FLOAT16_LIMIT).clamp(min=1.0).log2().ceil().exp2()
            v = _to_fp16(v / block_scale) * block_scale
        v_centre, v_scale = v_centre[:, :, 0], v_scale[:, :, 0]
    q = q * (call.scale_for(dim) * LOG2E)
    k, v, valid = k.flatten(2, 3), v.flatten(2, 3), keys.valid.flatten(2, 3)
    pv_limit = _per_head(call.thresholds.pv_threshold, q, 4)
    tokens = torch.arange(k.shape[2], device=q.device)
    out, lse, skips = [], [], torch.zeros(batch, heads, device=q.device)
    for i in range(q_blocks):
        rows = torch.arange(i * block_q, (i + 1) * block_q, device=q.device)
        allowed = valid[:, :, None] & mask[:, :, i].repeat_interleave(block_k, -1)[:, :, None]
        if call.causal:
            allowed = allowed & (tokens <= rows[:, None])
        scores = q[:, :, i] @ k.mT + keys.bias.flatten(2)[:, :, None]  # [B, H, b_q, k_blocks·b_k], log2 units
        scores = scores.masked_fill(~allowed, -math.inf)
        local = scores.unflatten(-1, (-1, block_k)).amax(-1)  # row maximum of each block
        running = local.cummax(-1).values.clamp(min=torch.finfo(scores.dtype).min)
        top = running[..., -1:]
        tail = None
        if call.pooled:
            tail = _tail_scores(q[:, :, i], keys, mask[:, :, i], rules.visible[:, :, i], emulated)
            top = torch.maximum(top, tail.amax(-1, keepdim=True))
        p = (scores - top).exp2()
        total = p.sum(-1, keepdim=True)
        if emulated:  # rounded against the maximum of its block, or the running one, as the kernels meet it
            shift = (local.clamp(min=torch.finfo(scores.dtype).min) if in_int8 else running)
            shift = shift.repeat_interleave(block_k, -1)
            p = (scores - shift).exp2()
            p = (_up_or_down(p, local) if in_int8 else _to_fp16(p)) * (shift - top).exp2()
            if in_int8:
                total = p.sum(-1, keepdim=True)
        skip = _skipped_groups(local, running, pv_limit)
        skips += (skip & mask[:, :, i][:, :, None]).sum((-2, -1))
        p = p.unflatten(-1, (-1, block_k)) * ~skip.repeat_interleave(ROW_GROUP, 2)[..., None]
        acc = p.flatten(-2) @ v
        if tail is not None:
            p = (tail - top).exp2()
            total = total + p.sum(-1, keepdim=True)
            means = values.sum(3) / keys.valid.sum(-1, keepdim=True).clamp(min=1) / v_scale
            if emulated:
                p, means = (x.bfloat16().to(x.dtype) for x in (p, means))
            acc = acc + p @ means
        out.append(torch.where(total == 0, 0.0, acc / total * v_scale + v_centre))
        lse.append((top + total.log2())[..., 0])
    groups = mask.sum((-2, -1)) * (block_q // ROW_GROUP)
    return torch.cat(out, 2), torch.cat(lse, 2), (skips / groups.clamp(min=1)).float()


def _centre_and_spread(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """By channel, the mean of values (B, H, k_blocks, b_k, D) over valid tokens, and the largest distance from it; both
    (B, H, 1, 1, D)."""
    valid = valid[..., None]
    centre = values.sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True).clamp(min=1)
    return centre, ((values - centre) * valid).abs().amax((2, 3), keepdim=True)


def _scale_of(spread: Tensor) -> Tensor:
    """What the channels of values (…, D) are divided by, from how far they reach: at least a share of the widest."""
    return spread.maximum(spread.amax(-1, keepdim=True) * LEAST_SPREAD).clamp(min=1e-12)


def _skipped_groups(local: Tensor, running: Tensor, limit: Tensor) -> Tensor:
    """The λ test (3.5): bool (B, H, b_q / ROW_GROUP, k_blocks), groups whose probabilities are all below 2^-limit."""
    below = (local - running).unflatten(2, (-1, ROW_GROUP)).amax(3)
    return below < -limit


def _tail_scores(q: Tensor, keys: Compressed, kept: Tensor, visible: Tensor, rounded: bool) -> Tensor:
    """Scores (B, H, b_q, k_blocks) of the pooled tail: each skipped block as one key, counted once per valid token."""
    mean, weight = keys.mean, keys.valid.sum(-1).clamp(min=1).to(q.dtype).log2() + keys.mean_bias
    if rounded:
        weight = _to_fp16(weight)
        step = mean.abs().amax(-1, keepdim=True).clamp(min=1e-12) / INT8_MAX * (1 + 2.0 ** -7)
        bits = weight.half().view(torch.int16).int()[..., None] & 0xFFFF  # they are the step's last
        step = (step.float().view(torch.int32) & -0x10000 | bits).view(torch.float32).to(mean.dtype)
        mean = (mean / step).round() * step
    scores = q @ mean.mT + weight[:, :, None]
    return scores.masked_fill(~(visible & ~kept)[:, :, None], -math.inf)


def _mixed(x: Tensor, groups: int) -> Tensor:
    """The orthonormal Hadamard transform of the channels of x (…, D) that lie D / groups apart, which undoes itself."""
    x = x.unflatten(-1, (groups, -1))
    transform = x.new_ones(1, 1)
    while len(transform) < groups:
        transform = torch.kron(x.new_tensor([[1, 1], [1, -1]]), transform)
    return (transform @ x * groups ** -0.5).flatten(-2)


def _int8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Symmetric INT8 rounding with one scale over `dims`."""
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-12) / INT8_MAX
    return (x / scale + 0.5).floor() * scale


def _up_or_down(p: Tensor, local: Tensor) -> Tensor:
    """P (B, H, b_q, k_blocks · b_k), from 0 to 1, in steps of 1/127, rounded as `to_int8_operand` does: up with the
    probability of the fraction, by the last bits of the row's maximum in the block, `local` (B, H, b_q, k_blocks)."""
    mixed = local.float().view(torch.int32).long() * 0x1E3779B1
    column = torch.arange(p.shape[-1] // local.shape[-1], device=p.device)
    up = (mixed[..., None] >> 8 * (column % 2 + 2 * (column // 8 % 2)) & 255).add(0.5) / 256
    return ((p.unflatten(-1, up.shape[-2:]) * INT8_MAX + up).floor() / INT8_MAX).flatten(-2).clamp(max=1.0)


def _to_fp16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) → (B, H, n, block, D), zero-padded."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _order_by_head(order: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The order (N,) or (Hkv, N) as int64 (heads, N)."""
    return order.long().expand(kv_heads, -1).repeat_interleave(heads // kv_heads, 0)


def _reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of x (B, H, N, ...) in the order (H, N)."""
    if order is None:
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


def _per_head(value: Threshold, like: Tensor, ndim: int) -> Tensor:
    """A threshold as a tensor that broadcasts over (B, H, ...) of `ndim` dimensions."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(1, -1, *[1] * (ndim - 2))

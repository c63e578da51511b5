"""A random call from a seed: shapes, strides, values and switches."""
from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import BlockMap, SpargeParams, block_shape

KINDS = 60
_DIMS = (1, 3, 8, 16, 17, 24, 33, 40, 48, 64, 64, 64, 72, 80, 88, 96, 100, 120, 128, 128, 128, 129, 160, 192, 255, 256)


@dataclass(frozen=True)
class Limits:
    """How large calls get, and which formats the device has."""

    device: str
    impl: str
    dtypes: tuple[torch.dtype, ...]
    pv_formats: tuple[str, ...]
    tokens: int
    rarely: int  # tokens of one call in 40
    heads: int  # of K, and of Q for each of those
    dims: tuple[int, ...] = _DIMS


@dataclass(frozen=True)
class Kind:
    """The properties that kernels are compiled for. There are only `KINDS` kinds: values and shapes compile nothing."""

    dim: int
    dtype: torch.dtype
    pv_dtype: str
    aligned: bool
    selection: str
    given: bool
    causal: bool
    skipped: str
    per_head: bool
    skips_products: bool
    padding: bool
    bias: bool
    order: torch.dtype | None
    sinks: bool
    dense_queries: bool
    lse: bool
    residual: bool

    @classmethod
    def of(cls, seed: int, limits: Limits) -> Kind:
        rng = random.Random(f"kind {seed % KINDS}")
        dim, dtype, pv_dtype = (rng.choice(x) for x in (limits.dims, limits.dtypes, limits.pv_formats))
        causal = rng.random() < 0.25
        return cls(dim=dim, dtype=dtype, pv_dtype=pv_dtype, aligned=dim % 8 == 0 and rng.random() < 0.6,
                   selection=rng.choice(("cdf_threshold", "topk")), given=rng.random() < 0.15, causal=causal,
                   skipped=rng.choice(("drop", "drop", "pooled")), per_head=rng.random() < 0.3,
                   skips_products=rng.random() < 0.4, padding=rng.random() < 0.4, bias=rng.random() < 0.3,
                   order=None if causal else rng.choice((None, torch.int32, torch.int64)),
                   sinks=rng.random() < 0.4, dense_queries=rng.random() < 0.3, lse=rng.random() < 0.3,
                   residual=rng.random() < 0.3)


@dataclass(frozen=True)
class Call:
    """q, k, v in `layout`, and the other arguments of `sparge_attention`, or with a `block_map` those of
    `block_sparse_attention`. `params` holds the thresholds of both. finite: no input but padding holds NaN or infinity.
    plain: no input is degenerate, so that neither ties nor float32's range decide anything. refreshes: whether to make
    and add residuals as well."""

    q: Tensor
    k: Tensor
    v: Tensor
    params: SpargeParams
    block_map: BlockMap | Tensor | None
    arguments: dict
    finite: bool
    plain: bool
    refreshes: bool


def draw(seed: int, limits: Limits) -> Call:
    """The call of a seed, on the device of `limits`."""
    kind, rng = Kind.of(seed, limits), random.Random(seed)
    generator = torch.Generator(limits.device).manual_seed(seed)
    tokens = limits.rarely if rng.random() < 0.025 else limits.tokens
    few = tokens != limits.tokens
    batch, kv_heads, group = (1 if few else rng.randint(1, limits.heads) for _ in range(3))
    heads = kv_heads * group
    k_tokens = tokens if few else _length(rng, tokens)
    q_tokens = k_tokens if kind.order or few or rng.random() < 0.5 else _length(rng, tokens)
    q, k, v, finite, plain = _values(rng, generator, (batch, heads, q_tokens, kind.dim),
                                     (batch, kv_heads, k_tokens, kind.dim))
    q, k, v = (x.clamp(-6e4, 6e4).to(kind.dtype) for x in (q, k, v))
    scale, padding = _scale(rng, q, k), torch.zeros(batch, k_tokens, dtype=torch.bool, device=limits.device)
    if kind.padding:
        padding = torch.rand(batch, k_tokens, generator=generator, device=limits.device) < rng.choice((0.1, 0.5, 0.95))
        padding[rng.randrange(batch), rng.randint(0, k_tokens):] = True
        if rng.random() < 0.2:
            padding[rng.randrange(batch)] = True
        poison = rng.choice((0.0, math.nan, math.inf))
        k, v = (x.masked_fill(padding[:, None, :, None], poison) for x in (k, v))
    if not finite:  # else the token was padding
        finite = not _spoil(rng, rng.choice((q, k, v)), padding)

    layout = rng.choice(("BHND", "BNHD"))
    q, k, v = (_restride(rng, x, kind.aligned, kind.padding) for x in (q, k, v))
    arguments = dict(scale=scale, causal=kind.causal, skipped=kind.skipped, layout=layout,
                     return_stats=rng.random() < 0.8, return_lse=kind.lse)
    if limits.impl == "triton":
        arguments["pv_dtype"] = kind.pv_dtype
    if kind.padding:
        arguments["key_padding_mask"] = _spread(rng, padding)
    if kind.bias:
        arguments["key_bias"] = _spread(rng, _bias(rng, generator, batch, k_tokens, limits.device))
    if kind.order:
        arguments["order"] = _spread(rng, _order(rng, generator, kv_heads, k_tokens, limits.device).to(kind.order))
    block_map = None
    if kind.given:
        shape = block_shape(q, impl=limits.impl, **{x: y for x, y in arguments.items() if x == "pv_dtype"})
        block_map = _given(rng, generator, (batch, heads), shape, q_tokens, k_tokens)
    else:
        for name, wanted, n in (("sink_keys", kind.sinks, k_tokens), ("dense_queries", kind.dense_queries, q_tokens)):
            if wanted:
                arguments[name] = [tuple(sorted((rng.randint(0, n), rng.randint(0, n)))) if rng.random() < 0.2 else
                                   (at, min(n, at + rng.randint(0, 3))) for at in (rng.randrange(n), rng.randrange(n))]
    params = _params(rng, generator, kind, heads, limits.device)
    if layout == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return Call(q, k, v, params, block_map, arguments, finite, plain,
                kind.residual and finite and not kind.given)


def _length(rng: random.Random, most: int) -> int:
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(1, 20)
    if kind < 0.4:  # about whole blocks
        return max(1, min(most, 16 * rng.randint(1, most // 16) + rng.choice((-1, 0, 1))))
    return rng.randint(1, most)


def _values(rng, generator, q_shape, k_shape) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
    """q, k, v in float32, whether they have to stay finite, and whether they are plain."""
    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=generator.device)

    q, k, v = randn(*q_shape), randn(*k_shape), randn(*k_shape)
    if rng.random() < 0.7:  # neighbours are alike
        frequency, phase = randn(1, 1, 1, q_shape[-1]) * 0.02, randn(1, 1, 1, q_shape[-1]) * 3
        for x in (q, k):
            position = torch.arange(x.shape[2], device=x.device)[:, None]
            x.mul_(0.3).add_((position * frequency + phase).cos() * rng.uniform(0.5, 2.5))
    k += randn(1, k_shape[1], 1, k_shape[3]) * rng.choice((0.0, 1.0, 1.0, 50.0))
    plain = rng.random() < 0.6
    finite = plain or rng.random() < 0.85
    if plain:
        return q, k, v, finite, plain
    for x in (q, k, v):
        twist, token, channel = rng.random(), rng.randrange(x.shape[2]), rng.randrange(x.shape[3])
        if twist < 0.1:
            x *= 1e4
        elif twist < 0.2:
            x *= rng.choice((1e-4, 1e-7, 1e-38))
        elif twist < 0.3:
            x[..., channel] = rng.choice((0.0, 1.0, -300.0))
        elif twist < 0.4:
            x[:, :, token] *= rng.choice((30.0, 1e3))
        elif twist < 0.5:
            x[:, :, token, channel] += rng.choice((-1.0, 1.0)) * 10 ** rng.uniform(1, 4)
        elif twist < 0.55:
            x[:] = x[:, :, :1]
        elif twist < 0.6:
            x.zero_()
    return q, k, v, finite, plain


def _spoil(rng, x: Tensor, padding: Tensor) -> bool:
    """Write NaN or infinity into a token of x (B, H, N, D) unless it is padding; returns whether it was written."""
    batch, token = rng.randrange(len(x)), rng.randrange(x.shape[2])
    if token < padding.shape[1] and padding[batch, token]:
        return False
    channel = slice(None) if rng.random() < 0.3 else rng.randrange(x.shape[3])
    x[batch, rng.randrange(x.shape[1]), token, channel] = rng.choice((math.nan, math.inf, -math.inf))
    return True


def _scale(rng, q: Tensor, k: Tensor) -> float | None:
    """None, or a factor that gives scores of a chosen size within float32's precision."""
    q, k = q.float(), k.float()
    apart, whole = ((x.norm(dim=-1).max() * q.norm(dim=-1).max()).item() for x in (k - k.mean(2, keepdim=True), k))
    largest = max(apart, 1e-3 * whole)  # keys that are all alike differ by rounding alone
    if largest * q.shape[-1] ** -0.5 < 200 and rng.random() < 0.5:
        return None
    return rng.choice((-1, 1, 1, 1, 1)) * 10 ** rng.uniform(0, 2) / max(largest, 1e-9)


def _restride(rng, x: Tensor, aligned: bool, padded: bool) -> Tensor:
    """The same values with other strides. If `aligned`, all strides and the address are multiples of 16 bytes.

    One way repeats the first head or batch for all of them, the batch only if batches share their padding.
    """
    batch, heads, n, dim = x.shape
    step = 8 if aligned else 1
    ways = ("contiguous", "permuted", "wide", "expanded") + (("strided channels",) if aligned or dim % 8 else ())
    way = rng.choice(ways + (() if aligned else ("offset", "apart")))
    if way == "permuted":
        places = rng.choice(((0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3), (1, 0, 2, 3)))
        return x.permute(places).contiguous().permute([places.index(i) for i in range(4)])
    if way == "wide":  # part of longer tokens and a longer sequence
        before, after = step * rng.randint(0, 3), step * rng.randint(0, 3)
        room = x.new_full((batch, heads, n + 3, before + dim + after), math.nan)
        room[:, :, 1:-2, before:before + dim] = x
        return room[:, :, 1:-2, before:before + dim]
    if way == "expanded":
        return x[:, :1].expand_as(x) if padded or rng.random() < 0.5 else x[:1].expand_as(x)
    if way == "strided channels":
        return torch.stack([x, x], -1)[..., 0]
    if way == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if way == "apart":  # tokens begin at 16 bytes from the first of their head where they can, heads do not
        gap = rng.randint(1, 7)
        return torch.nn.functional.pad(x.flatten(2), (0, gap))[..., :-gap].unflatten(2, (n, dim))
    return x


def _spread(rng, x: Tensor) -> Tensor:
    """The same values, sometimes not contiguous."""
    way = rng.random()
    if way < 0.2:
        return torch.stack([x, x], -1)[..., 0]
    if way < 0.4 and x.ndim == 2:
        return x.mT.contiguous().mT
    return x


def _bias(rng, generator, batch: int, n: int, device: str) -> Tensor:
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float32))
    bias = torch.randn(batch, n, generator=generator, device=device) * rng.choice((0.0, 1.0, 5.0))
    hidden = torch.rand(batch, n, generator=generator, device=device) < rng.choice((0.0, 0.1, 0.6))
    hidden[rng.randrange(batch), rng.randint(0, n):] = rng.random() < 0.5
    return bias.to(dtype).masked_fill(hidden, rng.choice((torch.finfo(dtype).min, -4e4, -math.inf)))


def _order(rng, generator, heads: int, n: int, device: str) -> Tensor:
    def one():
        if rng.random() < 0.3:
            return torch.randperm(n, generator=generator, device=device)
        return torch.arange(n, device=device).roll(rng.randrange(n)).flip(0)

    return one() if rng.random() < 0.5 else torch.stack([one() for _ in range(heads)])


def _given(rng, generator, leading: tuple[int, int], shape, q_tokens: int, k_tokens: int) -> BlockMap | Tensor:
    leading = [1 if rng.random() < 0.3 else x for x in leading]
    density = rng.choice((0.0, 0.2, 0.6, 1.0))
    drawn = torch.rand(*leading, *shape.counts(q_tokens, k_tokens), generator=generator, device=generator.device)
    mask = drawn < density
    if rng.random() < 0.2:
        return BlockMap.from_mask(mask, shape)
    if rng.random() < 0.3:
        return torch.stack([mask, ~mask], -1)[..., 0]
    return mask.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) if rng.random() < 0.3 else mask


def _params(rng, generator, kind: Kind, heads: int, device: str) -> SpargeParams:
    def values(choices):
        if not kind.per_head:
            return rng.choice(choices)
        return torch.tensor([rng.choice(choices) for _ in range(heads)]).to(device)

    pv_threshold = values((0.5, 2.0, 8.0)) if kind.skips_products else math.inf
    if kind.given:
        return SpargeParams(topk=1.0, pv_threshold=rng.choice((0.5, 3.0)) if kind.skips_products else math.inf)
    return SpargeParams(**{kind.selection: values((0.01, 0.1, 0.25, 0.3, 0.5, 0.6, 0.9, 0.999, 1.0))},
                        similarity_threshold=values((-1.0, 0.0, 0.2, 0.5, 0.8, 1.0)), pv_threshold=pv_threshold)

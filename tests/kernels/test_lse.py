"""The log-sum-exp of a row's scores: the definition, and what it is for."""
import math

import pytest
import torch
import torch.nn.functional as F

from comfyui_spargeattn.kernels import (
    BlockShape,
    SpargeParams,
    SpargeStats,
    block_map,
    block_sparse_attention,
    dense_attention,
    sparge_attention,
)
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv

HALF = SpargeParams(topk=0.5)


def padded(n, device):
    """bool (2, n): scattered, and everything in the second batch entry."""
    mask = torch.arange(n, device=device).expand(2, -1) % 3 == 1
    mask = mask.clone()
    mask[1] = True
    return mask


# name: the rest of a call on n tokens
CALLS = {
    "plain": lambda n, device: dict(params=HALF),
    "scale": lambda n, device: dict(params=HALF, scale=-0.2),
    "causal": lambda n, device: dict(params=HALF, causal=True),
    "padding": lambda n, device: dict(params=HALF, key_padding_mask=padded(n, device)),
    "bias": lambda n, device: dict(params=HALF, key_bias=torch.linspace(-4, 9, n, device=device).expand(2, -1)),
    "order": lambda n, device: dict(params=HALF, order=torch.arange(n, device=device).roll(37)),
    "pooled": lambda n, device: dict(params=HALF, skipped="pooled"),
    "pooled, padding, bias, order": lambda n, device: dict(
        params=HALF, skipped="pooled", key_padding_mask=padded(n, device),
        key_bias=torch.linspace(-4, 9, n, device=device).expand(2, -1), order=torch.arange(n, device=device).roll(37)),
    "lambda": lambda n, device: dict(params=SpargeParams(cdf_threshold=0.9, pv_threshold=1.0)),
}


def exact_lse(q, k, mask, block: BlockShape, *, params, scale=None, causal=False, key_padding_mask=None, key_bias=None,
              order=None, skipped="drop"):
    """float64 (B, H, N): by the definition, over the blocks of a map, with a mean score for each skipped one if pooled.
    """
    n = k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if key_padding_mask is not None:
        allowed = allowed & ~key_padding_mask[:, None, None]
    if key_bias is not None:
        scores = scores + key_bias[:, None, None].double()
    if order is not None:
        scores, allowed = (x[:, :, order][..., order] for x in (scores, allowed))
    kept = mask.repeat_interleave(block.q, 2)[:, :, :n].repeat_interleave(block.k, 3)[..., :n]
    if skipped == "pooled":
        one, of = (F.pad(x, (0, -n % block.k)).unflatten(-1, (-1, block.k)) for x in (scores * allowed, allowed))
        mean = one.sum(-1) / of.sum(-1).clamp(min=1)
        scores = scores.where(kept, mean.repeat_interleave(block.k, -1)[..., :n])
    else:
        allowed = allowed & kept
    lse = scores.masked_fill(~allowed, -math.inf).logsumexp(-1)
    return lse if order is None else lse[:, :, order.argsort()]


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
@pytest.mark.parametrize("name", CALLS)
def test_definition(name, layout):
    q, k, v = drifting_qkv(2, 4, 300, 16, kv_heads=2)
    call = CALLS[name](300, "cpu")
    found = block_map(q, k, **{name: value for name, value in call.items() if name != "skipped"})
    given = [x if layout == "BHND" else x.transpose(1, 2) for x in (q, k, v)]
    _, lse = sparge_attention(*given, layout=layout, return_lse=True, **call)
    expected = exact_lse(q, k, found.mask(), found.block, **call)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, 300)
    assert torch.equal(lse == -math.inf, expected == -math.inf)
    seen = expected > -math.inf
    assert_near(lse[seen], expected[seen], atol=2e-5)


def test_parts_of_the_keys_merge():
    """As ring attention does it."""
    q, k, v = drifting_qkv(1, 2, 300, 16)
    every = SpargeParams(cdf_threshold=1.0)
    parts = [sparge_attention(q, k[:, :, part], v[:, :, part], params=every, return_lse=True)
             for part in (slice(0, 100), slice(100, 300))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(weight[..., None] * out for weight, (out, _) in zip(weights, parts))
    assert_near(merged, dense_attention(q, k, v), atol=1e-5)


def test_what_is_returned():
    q, k, v = drifting_qkv(1, 1, 130, 16)
    out, stats, lse = sparge_attention(q, k, v, return_stats=True, return_lse=True)
    assert torch.equal(out, sparge_attention(q, k, v)) and isinstance(stats, SpargeStats)
    given, again = block_sparse_attention(q, k, v, torch.ones(1, 1, 2, 3, dtype=torch.bool), return_lse=True)
    assert_near(again, (q.double() @ k.double().mT / 4).logsumexp(-1), atol=2e-5)
    assert given.shape == q.shape and again.shape == lse.shape

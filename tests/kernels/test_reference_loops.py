"""The eager reference in float64 against plain loops."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import BlockShape, SpargeParams
from comfyui_spargeattn.kernels.reference import compress
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels.eager import sparge_attention
from comfyui_spargeattn.tests.kernels.loops import BLOCK, all_heads

N_Q, N_K = 90, 77
PADDING = torch.rand(2, N_K, generator=torch.Generator().manual_seed(5)) < 0.3
PADDING[1, 40:60] = True  # whole blocks among them
ORDERS = torch.stack([torch.arange(N_K).roll(30), torch.arange(N_K).flip(0)])
PER_HEAD = SpargeParams(cdf_threshold=torch.tensor([0.3, 0.6, 0.9, 1.0], dtype=torch.float64),
                        similarity_threshold=torch.tensor([-1.0, 0.5, 0.8, 0.9], dtype=torch.float64),
                        pv_threshold=torch.tensor([math.inf, 0.5, 2.0, 8.0], dtype=torch.float64))
CDF = SpargeParams(cdf_threshold=0.7, similarity_threshold=0.5)
TOPK = SpargeParams(topk=0.3, similarity_threshold=0.5)
UNJUDGED = SpargeParams(cdf_threshold=0.5, similarity_threshold=-1.0)
SKIPPING = SpargeParams(cdf_threshold=0.9, similarity_threshold=0.5, pv_threshold=1.0)
CASES = {
    "cdf": (CDF, {}),
    "topk": (TOPK, {}),
    "unjudged": (UNJUDGED, {}),
    "scale": (CDF, dict(scale=0.2)),
    "negative scale": (CDF, dict(scale=-0.2)),
    "lambda": (SKIPPING, {}),
    "per head": (PER_HEAD, {}),
    "pooled": (CDF, dict(skipped="pooled")),
    "pooled lambda topk": (SpargeParams(topk=0.4, pv_threshold=1.0), dict(skipped="pooled")),
    "causal": (UNJUDGED, dict(causal=True)),
    "causal, more keys than queries": (UNJUDGED, dict(causal=True, n_q=50)),
    "causal pooled": (TOPK, dict(causal=True, skipped="pooled")),
    "causal lambda": (SKIPPING, dict(causal=True)),
    "padding": (CDF, dict(padding=PADDING)),
    "padding pooled topk": (TOPK, dict(padding=PADDING, skipped="pooled")),
    "sinks": (UNJUDGED, dict(sink_keys=[(0, 3), (33, 34), (70, 77)])),
    "dense queries": (UNJUDGED, dict(dense_queries=[(40, 41)])),
    "order": (CDF, dict(order=ORDERS[0])),
    "order per head, all at once": (PER_HEAD, dict(order=ORDERS, padding=PADDING, skipped="pooled",
                                                   sink_keys=[(10, 12)], dense_queries=[(5, 6)])),
}


@pytest.mark.parametrize("params, call", CASES.values(), ids=CASES.keys())
def test_equals_loops(params, call):
    call = dict(call)
    n_q = call.pop("n_q", N_K if "order" in call else N_Q)
    q, k, v = drifting_qkv(2, 4, n_q, 8, k_tokens=N_K, kv_heads=2, dtype=torch.float64)
    k += 3.0  # to be subtracted before keys are found alike
    noise = torch.randn(2, 4, 32, 8, generator=torch.Generator().manual_seed(3)) * 2
    q[:, :, 32:64] += noise[:, :, :n_q - 32]  # a dissimilar block
    k[:, :, 16:24] += torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4)) * 4
    expected, mask, kept, skipped = all_heads(q, k, v, params, **call)
    call = {"key_padding_mask" if name == "padding" else name: value for name, value in call.items()}
    out, block_map, stats = sparge_attention(q, k, v, params=params, block=BLOCK, **call)
    assert torch.equal(block_map.mask(), mask)
    assert 0.05 < mask.double().mean() < 0.95, "a map that is all or nothing tests little"
    assert_near(out, expected, atol=1e-11)
    assert_near(stats.kept, kept, atol=1e-6, what="kept")
    assert_near(stats.pv_skipped, skipped, atol=1e-6, what="pv_skipped")
    if any(name == "pv_threshold" and torch.as_tensor(value).min() < 8 for name, value in params.items()):
        assert stats.pv_skipped.max() > 0.02, "the λ test never fired"


@pytest.mark.parametrize("topk, dtype", [(0.28, torch.float64), (0.6, torch.float32)])
def test_topk_rounds_up_no_further(topk, dtype):
    """The product with 25 blocks is a little more than a whole number."""
    assert (torch.tensor(topk, dtype=dtype) * 25).ceil() == round(topk * 25) + 1
    q, k, v = drifting_qkv(1, 1, 40, 8, k_tokens=200, dtype=dtype)
    _, block_map, _ = sparge_attention(q, k, v, params=SpargeParams(topk=topk), block=BlockShape(32, 8))
    assert bool((block_map.counts == round(topk * 25)).all())


def test_padding_has_no_part_in_what_keys_share():
    x = torch.randn(2, 4, N_K, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 3.0
    padding = PADDING[:, None].expand(-1, 4, -1)
    keys = compress(x, 8, flags=torch.zeros(4, N_K, dtype=torch.bool), padding=padding, centre=True)
    assert_near(keys.tokens.sum((2, 3)), torch.zeros(2, 4, 8), atol=1e-10)

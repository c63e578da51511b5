"""`block_sparse_attention` in the reference: what it refuses, and that it compiles."""
import pytest
import torch

from comfyui_spargeattn.kernels import (
    BlockMap,
    BlockShape,
    SpargeParams,
    block_shape,
    block_sparse_attention,
    dense_attention,
    sparge_attention,
)
from comfyui_spargeattn.tests.cases import random_qkv

Q, K, V = random_qkv(2, 4, 300, 16, k_tokens=200, kv_heads=2)
MASK = torch.ones(2, 4, 3, 4, dtype=torch.bool)
REFUSED = {
    "a list": ([[True]], TypeError, ["BlockMap", "tensor", "list"]),
    "float": (MASK.float(), TypeError, ["bool", "float32"]),
    "3-D": (MASK[0], ValueError, ["(2 or 1, 4 or 1, nq, nk)", "(4, 3, 4)"]),
    "another batch": (MASK[[0, 0, 0]], ValueError, ["2 or 1", "(3, 4, 3, 4)"]),
    "key heads": (MASK[:, :2], ValueError, ["4 or 1", "(2, 2, 3, 4)"]),
    "another device": (MASK.to("meta"), ValueError, ["cpu", "meta"]),
    "too few blocks": (MASK[..., :3], ValueError, ["(3, 4)", "(2, 4, 3, 3)"]),
    "another block": (BlockMap.from_mask(MASK, BlockShape(64, 64)), ValueError, ["q=128", "q=64"]),
}


@pytest.mark.parametrize("given, error, says", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(given, error, says):
    with pytest.raises(error) as caught:
        block_sparse_attention(Q, K, V, given)
    for part in ["block_map", *says]:
        assert part in str(caught.value)


def test_all_blocks_are_dense_attention():
    out = block_sparse_attention(Q, K, V, MASK[:1, :1])
    torch.testing.assert_close(out, dense_attention(Q, K, V).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pv_threshold", (0.2, 1.0))
def test_skips_products_below_the_threshold(pv_threshold):
    call = dict(scale=0.5, return_stats=True)
    whole, never = block_sparse_attention(Q, K, V, MASK, **call)
    out, stats = block_sparse_attention(Q, K, V, MASK, pv_threshold=pv_threshold, **call)
    params = SpargeParams(topk=1.0, pv_threshold=pv_threshold)
    expected, expected_stats = sparge_attention(Q, K, V, params=params, **call)
    assert not never.pv_skipped.any() and stats.pv_skipped.max() > 0.01 and not torch.equal(out, whole)
    assert torch.equal(out, expected) and torch.equal(stats.pv_skipped, expected_stats.pv_skipped)


def test_padding_and_the_diagonal_are_masked_inside_blocks():
    padding = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.3
    for causal in (False, True):
        out, stats = block_sparse_attention(Q, K, V, MASK, key_padding_mask=padding, causal=causal, return_stats=True)
        expected = dense_attention(Q, K, V, key_padding_mask=padding, causal=causal)
        torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
        assert bool((stats.kept == 1).all()), "blocks beyond the diagonal count as visible"


def test_compiles():
    given = BlockMap.from_mask(MASK.tril(), block_shape(Q))

    def run(q, k, v, mask):
        return block_sparse_attention(q, k, v, given) + block_sparse_attention(q, k, v, mask)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(Q, K, V, MASK)
    assert torch.equal(compiled, run(Q, K, V, MASK))

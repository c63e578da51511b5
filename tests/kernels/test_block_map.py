"""BlockMap: lists and masks say the same."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockMap, BlockShape, SpargeParams, block_map, sparge_attention
from comfyui_spargeattn.tests.cases import drifting_qkv

BLOCK = BlockShape(64, 32)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (1, 2, 7, 130)])
@pytest.mark.parametrize("density", (0.0, 0.3, 1.0))
def test_round_trip(shape, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    lists = BlockMap.from_mask(mask, BLOCK)
    assert lists.indices.dtype == lists.counts.dtype == torch.int32 and lists.block == BLOCK
    assert torch.equal(lists.counts, mask.sum(-1))
    assert torch.equal(lists.mask(), mask)
    for row, count, expected in zip(lists.indices.flatten(0, 2), lists.counts.flatten(), mask.flatten(0, 2)):
        assert row[:count].tolist() == expected.nonzero()[:, 0].tolist()  # ascending


def test_entries_past_the_count_are_ignored():
    mask = torch.tensor([True, False, True, False])[None, None, None]
    lists = BlockMap.from_mask(mask, BLOCK)
    lists.indices[..., 2:] = torch.tensor([-7, 1 << 30], dtype=torch.int32)
    assert torch.equal(lists.mask(), mask)


def test_counts_blocks():
    assert BlockShape(128, 64).counts(1, 64) == (1, 1)
    assert BlockShape(128, 64).counts(129, 65) == (2, 2)


def test_is_the_map_that_attention_uses():
    q, k, v = drifting_qkv(2, 4, 500, 16, kv_heads=2)
    call = dict(params=SpargeParams(topk=0.25, similarity_threshold=-1.0), sink_keys=[(0, 3)],
                dense_queries=[(499, 500)])
    shown = block_map(q, k, **call)
    _, stats = sparge_attention(q, k, v, return_stats=True, **call)
    mask = shown.mask()
    assert torch.allclose(stats.kept, mask.float().mean((2, 3))) and torch.allclose(stats.sparsity, 1 - stats.kept)
    assert mask.shape[2:] == shown.block.counts(500, 500) and 0.25 < mask.float().mean() < 0.7
    swapped = block_map(q.transpose(1, 2), k.transpose(1, 2), layout="BNHD", **call)
    assert torch.equal(swapped.mask(), mask)

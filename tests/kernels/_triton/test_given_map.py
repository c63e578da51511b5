"""Attention over a map that the caller gives, against the reference over the same map."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import BlockMap, SpargeParams, block_shape, block_sparse_attention
from comfyui_spargeattn.tests.cases import random_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, PV_FORMATS, check_output, recorded_maps

pytestmark = pytest.mark.usefixtures("small_blocks")


def padding(batch, n_k):
    """The first half of the keys and the very last are padding, in the last batch alone."""
    mask = torch.zeros(batch, n_k, dtype=torch.bool, device=DEVICE)
    mask[-1, :n_k // 2] = mask[-1, -1] = True
    return mask


# name: (inputs, shape of the map's leading dimensions, the call)
CASES = {
    "plain": (dict(batch=2, heads=2, q_tokens=256, dim=32), (2, 2), {}),
    "ragged, one map for all": (dict(batch=2, heads=4, q_tokens=201, k_tokens=333, kv_heads=2, dim=40), (1, 1), {}),
    "causal": (dict(batch=1, heads=2, q_tokens=300, dim=32), (1, 2), dict(causal=True)),
    "causal, fewer keys": (dict(batch=1, heads=2, q_tokens=300, k_tokens=150, dim=32), (1, 2), dict(causal=True)),
    "padding": (dict(batch=2, heads=2, q_tokens=130, k_tokens=290, kv_heads=1, dim=32), (2, 1),
                dict(key_padding_mask=True)),
    "pooled": (dict(batch=2, heads=2, q_tokens=256, dim=32), (2, 2), dict(skipped="pooled", key_padding_mask=True)),
    "pooled, causal": (dict(batch=1, heads=2, q_tokens=230, dim=32), (1, 2), dict(skipped="pooled", causal=True)),
    "order": (dict(batch=1, heads=2, q_tokens=260, dim=32), (1, 2), dict(order=True)),
    "order, not contiguous": (dict(batch=1, heads=2, q_tokens=260, dim=32), (1, 2), dict(order="strided")),
    "BNHD": (dict(batch=1, heads=2, q_tokens=140, k_tokens=200, dim=32), (1, 2), dict(layout="BNHD")),
    "lambda": (dict(batch=1, heads=2, q_tokens=260, dim=32), (1, 2), dict(pv_threshold=0.2, scale=0.5)),
    "map with columns apart": (dict(batch=1, heads=2, q_tokens=200, dim=32), (1, 2), dict(strides="columns apart")),
    "map transposed": (dict(batch=1, heads=2, q_tokens=200, dim=32), (1, 2), dict(strides="transposed")),
}


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name, pv_dtype):
    shape, leading, call = CASES[name]
    call = dict(call)
    q, k, v = random_qkv(**shape, dtype=torch.float16, device=DEVICE)
    if "key_padding_mask" in call:
        call["key_padding_mask"] = padding(q.shape[0], k.shape[2])
    if "order" in call:
        order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE)
        call["order"] = order.repeat_interleave(2)[::2] if call["order"] == "strided" else order
    block = block_shape(q, pv_dtype=pv_dtype, impl="triton")
    nq, nk = block.counts(q.shape[2], k.shape[2])
    mask = torch.rand(*leading, nq, nk, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.5
    mask[..., -1] = True
    mask[..., 0, :] = False  # a row without any block
    strides = call.pop("strides", None)
    if strides == "columns apart":
        mask = torch.stack([mask, ~mask], -1)[..., 0]
    elif strides == "transposed":
        mask = mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    layout = call.pop("layout", "BHND")
    inputs = (q, k, v) if layout == "BHND" else [x.transpose(1, 2) for x in (q, k, v)]
    with recorded_maps() as maps:
        out, stats = block_sparse_attention(*inputs, mask, layout=layout, pv_dtype=pv_dtype, impl="triton",
                                            return_stats=True, **call)
    out = out if layout == "BHND" else out.transpose(1, 2)
    call.setdefault("params", SpargeParams(topk=1.0, pv_threshold=call.pop("pv_threshold", math.inf)))
    check_output(q, k, v, out, stats, maps[0], block_mask=mask, pv_dtype=pv_dtype,
                 tight=call["params"].pv_threshold < math.inf and pv_dtype == "fp16", **call)
    assert maps[0].block == block and (stats.pv_skipped.max() > 0.02) == (call["params"].pv_threshold < math.inf)
    if "skipped" not in call and "order" not in call:
        assert not out[:, :, :block.q].any() and out.any()


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_values_beyond_the_sample(pv_dtype, monkeypatch):
    """A block whose values have a scale of their own is multiplied by it, in the heads that have it."""
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", 64)
    q, k, v = random_qkv(1, 4, 130, 32, k_tokens=300, kv_heads=2, device=DEVICE)
    v[:, 0, 165, ::2] *= 1e6  # its neighbours are sampled, it is not
    block = block_shape(q, pv_dtype=pv_dtype, impl="triton")
    mask = torch.ones(1, 1, *block.counts(130, 300), dtype=torch.bool, device=DEVICE)
    with recorded_maps() as maps:
        out = block_sparse_attention(q, k, v, mask, pv_dtype=pv_dtype, impl="triton")
    check_output(q, k, v, out, None, maps[0], block_mask=mask, params=SpargeParams(topk=1.0), pv_dtype=pv_dtype)
    assert out[:, :2].abs().max() > 1e3 > out[:, 2:].abs().max()


def test_takes_a_block_map():
    q, k, v = random_qkv(1, 2, 200, 32, dtype=torch.float16, device=DEVICE)
    block = block_shape(q, pv_dtype="fp16", impl="triton")
    mask = torch.rand(1, 2, *block.counts(200, 200), generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    call = dict(pv_dtype="fp16", impl="triton")
    given = block_sparse_attention(q, k, v, BlockMap.from_mask(mask, block), **call)
    assert torch.equal(given, block_sparse_attention(q, k, v, mask, **call))


def test_an_empty_map_gives_zeros():
    q, k, v = random_qkv(1, 2, 200, 32, dtype=torch.float16, device=DEVICE)
    blocks = block_shape(q, pv_dtype="fp16", impl="triton").counts(200, 200)
    mask = torch.zeros(1, 1, *blocks, dtype=torch.bool, device=DEVICE)
    assert not block_sparse_attention(q, k, v, mask, pv_dtype="fp16", impl="triton").any()

"""Channels of V whose sample says nothing about the rest: the block's own range serves."""
import pytest
import torch

from comfyui_spargeattn.kernels import (
    SpargeParams,
    block_shape,
    block_sparse_attention,
    dense_attention,
    sparge_attention,
)
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, PV_FORMATS, check_output, recorded_maps

N, SAMPLE, OUTLIER = 400, 64, 301
LIMITS = {"fp16": 0.02, "int8": 0.03}
ALL = SpargeParams(topk=1.0)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", SAMPLE)


def sampled():
    place = torch.arange(SAMPLE, dtype=torch.int64)
    return (((place * 2654435769) & 0xFFFFFFFF) * N >> 32).unique()


def attend(q, k, v, pv_dtype, params=ALL, **call):
    return sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, impl="triton", **call)


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("size", (1e-3, 1.0, 1e3), ids=str)
def test_only_unsampled_keys_are_left(size, pv_dtype, small_blocks):
    q, k, v = drifting_qkv(1, 2, N, 64, dtype=torch.float16, device=DEVICE)
    v *= size
    mask = torch.zeros(1, N, dtype=torch.bool, device=DEVICE)
    mask[0, sampled().to(DEVICE)] = True
    exact = dense_attention(q, k, v, key_padding_mask=mask)
    assert relative_l1(attend(q, k, v, pv_dtype, key_padding_mask=mask), exact) < LIMITS[pv_dtype]
    # The pooled tail alone, whose means are larger than float16 holds.
    block = block_shape(q, pv_dtype=pv_dtype, impl="triton")
    none = torch.zeros(1, 1, -(-N // block.q), -(-N // block.k), dtype=torch.bool, device=DEVICE)
    call = dict(key_padding_mask=mask, skipped="pooled", pv_dtype=pv_dtype)
    with recorded_maps() as maps:
        out, stats = block_sparse_attention(q, k, v, none, impl="triton", return_stats=True, **call)
    check_output(q, k, v, out, stats, maps[0], params=ALL, block_mask=none, **call)


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("large", (False, True))
@pytest.mark.parametrize("constant", (0.0, 0.5), ids=str)
def test_a_constant_channel_with_one_outlier(constant, large, pv_dtype, small_blocks):
    """The channel is right, and so are the others in the outlier's block."""
    outlier = {"fp16": 300.0, "int8": 10.0}[pv_dtype] if large else 1.0
    assert OUTLIER not in sampled().tolist()
    q, k, v = drifting_qkv(1, 1, N, 64, dtype=torch.float16, device=DEVICE)
    v[..., 7] = constant
    v[0, 0, OUTLIER, 7] = outlier
    out, exact = attend(q, k, v, pv_dtype), dense_attention(q, k, v)
    rows = slice(OUTLIER - 20, OUTLIER + 20)  # attend the outlier most
    for channels in ([7], [c for c in range(64) if c != 7]):
        found = relative_l1(out[0, 0, rows][:, channels], exact[0, 0, rows][:, channels])
        assert found < 2 * LIMITS[pv_dtype], f"channels {channels[:3]}…: {found}"


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_every_channel_is_constant_but_for_outliers(pv_dtype, small_blocks):
    q, k, v = drifting_qkv(1, 1, N, 64, dtype=torch.float16, device=DEVICE)
    v[:] = 0.25
    v[0, 0, OUTLIER], v[0, 0, 200] = 40.0, 2e-3
    assert relative_l1(attend(q, k, v, pv_dtype), dense_attention(q, k, v)) < LIMITS[pv_dtype]

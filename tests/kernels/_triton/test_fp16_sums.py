"""16-bit P·V summed in float16 inside a block, as GeForce's tensor cores do it at twice the rate."""
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv, random_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, check_call

ALL = SpargeParams(topk=1.0)


@pytest.fixture(params=(False, True), ids=("float32 sums", "float16 sums"))
def sums(request, monkeypatch, small_blocks):
    from comfyui_spargeattn.kernels._triton import pipeline
    configuration = pipeline.configuration
    monkeypatch.setattr(pipeline, "configuration",
                        lambda *call: replace(configuration(*call), fp16_sums=request.param))


@pytest.mark.parametrize("switch", (dict(), dict(causal=True), dict(skipped="pooled")), ids=str)
def test_agrees_with_the_reference(switch, sums):
    q, k, v = drifting_qkv(1, 2, 200, 64, dtype=torch.float16, device=DEVICE)
    check_call(q, k, v, params=SpargeParams(topk=0.5), pv_dtype="fp16", **switch)


@pytest.mark.parametrize("size", (1.0, 3e4), ids=str)
def test_the_worst_values_do_not_overflow(size, sums):
    """All keys weigh the same and all values are the largest: no sum over a block can be larger."""
    q, k, v = random_qkv(1, 1, 300, 64, dtype=torch.float16, device=DEVICE)
    k[:] = k[:, :, :1]
    v = v.sign() * size
    v[..., :32] = size  # one sign
    v[:, :, 7] = -size
    out = sparge_attention(q, k, v, params=ALL, pv_dtype="fp16", impl="triton")
    assert relative_l1(out, dense_attention(q, k, v)) < 0.01


def test_values_beyond_the_sample_do_not_overflow(sums, monkeypatch):
    """Blocks whose values are 10^4 times the sampled ones, each the largest that its scale leaves."""
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", 64)
    n = 400
    place = torch.arange(64, dtype=torch.int64)
    taken = (((place * 2654435769) & 0xFFFFFFFF) * n >> 32).unique().to(DEVICE)
    q, k, v = random_qkv(1, 1, n, 64, dtype=torch.float16, device=DEVICE)
    k[:] = k[:, :, :1]
    v[:] = 3e4
    v[:, :, taken] = 3.0 * torch.randn(1, 1, len(taken), 64, device=DEVICE).to(torch.float16)
    out = sparge_attention(q, k, v, params=ALL, pv_dtype="fp16", impl="triton")
    assert relative_l1(out, dense_attention(q, k, v)) < 0.01


def test_error_is_that_of_float32_sums(monkeypatch, small_blocks):
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v = drifting_qkv(1, 2, 400, 64, dtype=torch.float32, device=DEVICE)
    exact, errors, configuration = dense_attention(q, k, v), [], pipeline.configuration
    for fp16_sums in (False, True):
        monkeypatch.setattr(pipeline, "configuration",
                            lambda *call, x=fp16_sums: replace(configuration(*call), fp16_sums=x))
        errors.append(relative_l1(sparge_attention(q, k, v, params=ALL, pv_dtype="fp16", impl="triton"), exact))
    assert errors[1] < 1.05 * errors[0]

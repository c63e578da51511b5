"""Sequences of more than 100 thousand tokens, and tensors whose offsets do not fit 32 bits."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockMap, SpargeParams, sparge_attention
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv, video_qkv
from comfyui_spargeattn.tests.gpu.device import needs_gpu
from comfyui_spargeattn.tests.kernels._triton.harness import PV_FORMATS, check_call, recorded_maps

pytestmark = needs_gpu
# Relative L1 of INT8 Q·Kᵀ and of the format of P·V alone, against float64 with the same block map.
BOUNDS = {"fp16": 0.02, "int8": 0.025}


def exact_rows(q, k, v, found: BlockMap, rows: slice):
    """float64 attention of some query rows over the blocks that the map keeps for them; q, k, v have one head."""
    blocks = torch.arange(rows.start, rows.stop, device=q.device) // found.block.q
    kept = found.mask()[:, :, blocks].repeat_interleave(found.block.k, -1)[..., :k.shape[2]]
    scores = q[:, :, rows].double() @ k.double().mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~kept, -torch.inf).softmax(-1) @ v.double()


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_more_than_100_thousand_tokens(pv_dtype):
    q, k, v = video_qkv((41, 50, 55), 2, 128)
    n = q.shape[2]
    assert n > 100_000
    for params in (SpargeParams(topk=0.05), SpargeParams(cdf_threshold=1.0)):
        with recorded_maps() as maps:
            out = sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, impl="triton")
        assert bool(out.isfinite().all())
        for start in (0, n // 2, n - 200):
            rows = slice(start, start + 200)
            error = relative_l1(out[:, :, rows], exact_rows(q, k, v, maps[0], rows))
            assert error <= BOUNDS[pv_dtype], f"rows from {start}: {error:.4f}"
        if params.topk is None:
            dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, :200], k, v)
            assert relative_l1(out[:, :, :200], dense) <= BOUNDS[pv_dtype] + 0.005  # bf16 rounding of the other


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_long_sums_are_not_truncated(pv_dtype):
    """Diffuse attention over values of one sign: FP8 tensor cores lose several percent of a sum that they carry on."""
    n = 32_760
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (0.3 * torch.randn(1, 2, n, 128, generator=generator, device="cuda") for _ in range(3))
    q[..., 0], k[:, :, :n // 2, 0] = 4.0, 3.1  # three quarters of the mass lie in the first half
    v[:, :, :n // 2] += 1.0
    v[:, :, n // 2:] -= 1.0
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with recorded_maps() as maps:
        out = sparge_attention(q, k, v, params=SpargeParams(cdf_threshold=1.0), pv_dtype=pv_dtype, impl="triton")
    rows = slice(1000, 1200)
    exact = exact_rows(q, k, v, maps[0], rows)
    assert 0.45 < exact.mean() < 0.55
    assert abs((out[:, :, rows].double() / exact).mean() - 1) < 0.01


@pytest.mark.parametrize("far", ("batch", "head", "token"))
def test_strides_beyond_32_bits(far):
    """Views whose last element lies more than 2³¹ elements after the first."""
    tokens, dim = 300, 64
    inputs = drifting_qkv(2, 2, tokens, dim, dtype=torch.float16, device="cuda")
    strides = {"batch": (2 ** 31 + 64, 3 * tokens * dim, dim), "head": (3 * tokens * dim, 2 ** 31 + 64, dim),
               "token": (2 * dim, dim, 2 ** 23)}[far]
    room = 2 ** 31 + 64 + 16 * tokens * dim if far != "token" else tokens * 2 ** 23
    views = []
    storage = torch.full((room,), torch.nan, dtype=torch.float16, device="cuda")
    for i, x in enumerate(inputs):
        offset = i * tokens * dim if far != "token" else i * 4 * dim
        view = storage.as_strided(x.shape, (*strides, 1), offset)
        view.copy_(x)
        views.append(view)
    assert sum((n - 1) * s for n, s in zip(views[0].shape, views[0].stride(), strict=True)) > 2 ** 31
    assert all(torch.equal(view, x) for view, x in zip(views, inputs, strict=True)), "the views overlap"
    check_call(*views, params=SpargeParams(topk=0.5))


def test_output_beyond_32_bits():
    """More than 2³¹ output elements, from queries that many heads share."""
    heads, q_tokens, dim = 64, 262_400, 128
    q, k, v = drifting_qkv(1, 1, q_tokens, dim, k_tokens=2048, dtype=torch.float16, device="cuda")
    with recorded_maps() as maps:
        out = sparge_attention(q.expand(-1, heads, -1, -1), k, v, params=SpargeParams(topk=0.1), pv_dtype="fp16",
                               impl="triton")
    assert out.numel() > 2 ** 31
    first = out[:, :1]
    for head in (1, heads // 2, heads - 1):
        assert torch.equal(out[:, head:head + 1], first), f"head {head} differs from head 0"
    found = BlockMap(maps[0].indices[:, :1], maps[0].counts[:, :1], maps[0].block)
    for start in (0, q_tokens - 200):
        rows = slice(start, start + 200)
        assert relative_l1(first[:, :, rows], exact_rows(q, k, v, found, rows)) <= BOUNDS["fp16"]

"""Whole calls of the kernels: shapes, switches, layouts, memory."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import BlockShape, SpargeParams, block_map
from comfyui_spargeattn.kernels.formats import LOG2E
from comfyui_spargeattn.tests.cases import drifting_qkv, random_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, DTYPES, ON_GPU, PV_FORMATS, check_call

HEAD_DIMS = (40, 64, 72, 80, 88, 96, 120, 128, 160, 256)
LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
CDF = SpargeParams(cdf_threshold=0.7, similarity_threshold=0.3)
TOPK = SpargeParams(topk=0.4, similarity_threshold=0.3)
N = 1500 if ON_GPU else 200  # several blocks each way
formats = pytest.mark.parametrize("pv_dtype", PV_FORMATS)


# Every dtype at the common head_dims, the others in turn.
DIMS_AND_DTYPES = [(dim, dtype) for i, dim in enumerate(HEAD_DIMS) for dtype in DTYPES
                   if dim in (64, 128) or dtype == DTYPES[i % len(DTYPES)]]


@formats
@pytest.mark.parametrize("dim, dtype", DIMS_AND_DTYPES, ids=str)
def test_head_dims(dim, dtype, pv_dtype, small_blocks):
    q, k, v = drifting_qkv(1, 2, N if ON_GPU else 150, dim, kv_heads=1, dtype=dtype, device=DEVICE)
    check_call(q, k, v, params=TOPK, pv_dtype=pv_dtype, max_kept=0.9)


@formats
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(n, pv_dtype):
    check_call(*drifting_qkv(1, 1, n, 64, dtype=torch.float16, device=DEVICE), params=CDF, pv_dtype=pv_dtype)


@formats
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n_q, n_k", [(1, 200), (200, 1), (65, 129), (129, 63)])
def test_cross_lengths(n_q, n_k, causal, pv_dtype):
    check_call(*drifting_qkv(1, 1, n_q, 64, k_tokens=n_k, dtype=torch.float16, device=DEVICE), params=CDF,
               causal=causal, pv_dtype=pv_dtype)


def padding(kind):
    """bool (2, N): scattered, at the end by whole blocks, and everything."""
    mask = torch.zeros(2, N, dtype=torch.bool, device=DEVICE)
    mask[0] = torch.rand(N, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    mask[1, N // 3:] = True
    if kind == "everything":
        mask[1] = True
    return mask


def orders(rows):
    generator = torch.Generator().manual_seed(1)
    shifts = [torch.arange(N).roll(int(torch.randint(N, (), generator=generator))) for _ in range(rows)]
    return torch.stack([shifts[0], *(shift.flip(0) for shift in shifts[1:])]).int().to(DEVICE)


PER_HEAD = dict(cdf_threshold=torch.tensor([0.3, 0.6, 0.9, 1.0]),
                similarity_threshold=torch.tensor([-1.0, 0.3, 0.5, 0.9]),
                pv_threshold=torch.tensor([math.inf, 1.0, 3.0, 9.0]))
# name: (thresholds, rest of the call)
SWITCHES = {
    "cdf": (dict(cdf_threshold=0.6), {}),
    "topk": (dict(topk=0.3), {}),
    "judge off": (dict(cdf_threshold=0.5, similarity_threshold=-1.0), dict(scale=0.05)),
    "negative scale": (dict(cdf_threshold=0.6), dict(scale=-0.2)),
    "per head": (PER_HEAD, dict(min_skipped=0.01)),
    "lambda": (dict(cdf_threshold=0.9, pv_threshold=1.0), dict(min_skipped=0.02)),
    "pooled": (dict(topk=0.3), dict(skipped="pooled")),
    "pooled lambda": (dict(topk=0.5, pv_threshold=1.0), dict(skipped="pooled", min_skipped=0.02)),
    "causal": (dict(cdf_threshold=0.6), dict(causal=True)),
    "causal pooled": (dict(topk=0.3), dict(causal=True, skipped="pooled")),
    "causal lambda": (dict(cdf_threshold=0.9, pv_threshold=1.0), dict(causal=True, min_skipped=0.01)),
    "padding": (dict(cdf_threshold=0.6), dict(key_padding_mask=padding("some"))),
    "padding everything": (dict(topk=0.3), dict(key_padding_mask=padding("everything"), skipped="pooled")),
    "causal padding": (dict(cdf_threshold=0.6), dict(causal=True, key_padding_mask=padding("some"))),
    "strided padding": (dict(cdf_threshold=0.6), dict(key_padding_mask=padding("some").mT.contiguous().mT)),
    "sinks": (dict(topk=0.2, similarity_threshold=-1.0), dict(sink_keys=[(0, 3), (N - 40, N - 39), (126, 128)])),
    "dense queries": (dict(topk=0.2, similarity_threshold=-1.0), dict(dense_queries=[(126, 128), (N - 1, N)])),
    "order": (dict(topk=0.3), dict(order=orders(1)[0])),
    "strided order": (dict(topk=0.3), dict(order=orders(1)[0].long().repeat_interleave(2)[::2])),
    "order per head, all at once": (PER_HEAD, dict(order=orders(2).mT.contiguous().mT, key_padding_mask=padding("some"),
                                                   skipped="pooled", sink_keys=[(10, 12)], dense_queries=[(5, 6)])),
}


@formats
@pytest.mark.parametrize("thresholds, call", SWITCHES.values(), ids=SWITCHES.keys())
def test_switches(thresholds, call, pv_dtype, small_blocks):
    per_head = isinstance(next(iter(thresholds.values())), torch.Tensor)
    batch, heads = 2, 4 if per_head else 2
    kv_heads = 2 if per_head else 1
    q, k, v = drifting_qkv(batch, heads, N, 64, kv_heads=kv_heads, dtype=torch.float16, device=DEVICE)
    params = SpargeParams(**dict(similarity_threshold=0.3) | thresholds).to(DEVICE)
    check_call(q, k, v, params=params, pv_dtype=pv_dtype, min_kept=0.02, max_kept=0.95, **call)


def test_half_precision_keeps_padding_out():
    """NaN and infinity in padding tokens reach neither the means nor the output."""
    q, k, v = drifting_qkv(2, 1, 200, 64, dtype=torch.float16, device=DEVICE)
    mask = torch.zeros(2, 200, dtype=torch.bool, device=DEVICE)
    mask[0, 150:], mask[1, 3:9] = True, True
    k[0, :, 150:], v[0, :, 150:] = torch.nan, torch.inf
    k[1, :, 3:9], v[1, :, 3:9] = torch.inf, torch.nan
    check_call(q, k, v, params=CDF, key_padding_mask=mask)


VIEWS = ("BNHD", "packed", "sliced", "unaligned", "heads unaligned", "batches unaligned", "expanded",
         "strided channels")


@pytest.mark.parametrize("view", VIEWS)
def test_views(view, small_blocks):
    """Any strides, as models leave them."""
    q, k, v = drifting_qkv(2, 2, 150, 40, dtype=torch.float16, device=DEVICE)
    layout = "BHND"
    if view == "BNHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        layout = "BNHD"
    elif view == "packed":  # one projection to q, k and v: (B, N, 3, H, D)
        q, k, v = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2).unbind(2)
        layout = "BNHD"
    elif view == "sliced":  # part of longer tokens and of a longer sequence; rows that are not 16-byte aligned
        q, k, v = (torch.nn.functional.pad(x, (3, 2, 5, 7), value=torch.nan)[:, :, 5:-7, 3:-2] for x in (q, k, v))
    elif view == "unaligned":  # starts one element into its storage
        q, k, v = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v))
    elif view == "heads unaligned":  # every token starts at 16 bytes from the first of its head, but heads do not
        q, k, v = (torch.nn.functional.pad(x.flatten(2), (0, 4))[..., :-4].unflatten(2, x.shape[2:]) for x in (q, k, v))
        assert q.stride(1) % 8 and not q.stride(2) % 8
    elif view == "batches unaligned":
        q, k, v = (torch.nn.functional.pad(x.flatten(1), (0, 4))[..., :-4].unflatten(1, x.shape[1:]) for x in (q, k, v))
        assert q.stride(0) % 8 and not q.stride(1) % 8 and not q.stride(2) % 8
    elif view == "expanded":
        q, k, v = (x[:1].expand(2, -1, -1, -1) for x in (q, k, v))
    else:
        q, k, v = (torch.stack([x, x], -1)[..., 0] for x in (q, k, v))
        assert q.stride(-1) == 2
    check_call(q, k, v, params=TOPK, layout=layout)


@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 64), (64, 32)], ids=str)
def test_block_shapes(shape, dim, monkeypatch):
    """Every block shape of the launch tables, also with tensor memory descriptors where the device has them, and with
    both orders of the keys of INT8 values."""
    from comfyui_spargeattn.kernels._triton import pipeline
    from comfyui_spargeattn.kernels._triton.config import AttendConfig
    for pv_dtype, changes in (("fp16", {}), ("fp16", dict(tma=True)), ("int8", {}), ("int8", dict(key_group=32))):
        config = AttendConfig(BlockShape(*shape), 4, 2, **changes)
        monkeypatch.setattr(pipeline, "attend_config", lambda *key, config=config: config)
        found = check_call(*drifting_qkv(1, 1, 270, dim, dtype=torch.float16, device=DEVICE), params=TOPK,
                           pv_dtype=pv_dtype)
        assert found.block == BlockShape(*shape)


def sampled_less(monkeypatch):
    """Take the constants of K and V from 64 tokens, of which some later one is none; returns that one."""
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", 64)
    place = torch.arange(64)
    taken = set((((place * 2654435769) & 0xFFFFFFFF) * N >> 32).tolist())
    return next(token for token in range(N // 2, N) if token not in taken)


@formats
@pytest.mark.parametrize("factor", (1e6, 1e10))
@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_values_beyond_the_sample(skipped, factor, pv_dtype, monkeypatch, small_blocks):
    """A value that dwarfs all that were sampled keeps its size, wherever a block of it is listed."""
    outlier = sampled_less(monkeypatch)
    q, k, v = drifting_qkv(1, 4, N, 64, kv_heads=2, dtype=torch.float32, device=DEVICE)
    v[:, 1, outlier, ::2] *= factor  # in one head of K alone
    check_call(q, k, v, params=SpargeParams(topk=0.5), skipped=skipped, pv_dtype=pv_dtype, max_kept=0.9)


@pytest.mark.parametrize("kind", ("plain", "everything"))
def test_block_map_is_what_attention_uses(kind, small_blocks):
    q, k, v = drifting_qkv(2, 4, N, 64, kv_heads=2, dtype=torch.float16, device=DEVICE)
    call = dict(params=SpargeParams(cdf_threshold=0.4, similarity_threshold=-1.0), pv_dtype="fp16",
                sink_keys=[(N - 40, N - 39)])
    if kind == "everything":
        call |= dict(params=SpargeParams(**PER_HEAD).to(DEVICE), dense_queries=[(70, 71)], scale=0.3,
                     key_padding_mask=padding("some"), order=orders(2))
    used = check_call(q, k, v, max_kept=0.95, **call)
    shown = block_map(q, k, impl="triton", **call)
    assert shown.block == used.block and torch.equal(shown.mask(), used.mask())
    swapped = block_map(q.transpose(1, 2), k.transpose(1, 2), impl="triton", layout="BNHD", **call)
    assert torch.equal(swapped.mask(), used.mask())


@pytest.mark.parametrize("causal", (False, True))
def test_long_rows_of_the_map(causal, monkeypatch):
    """Rows of the map that take several steps of the selecting kernel."""
    from comfyui_spargeattn.kernels._triton import blockmap, pipeline
    from comfyui_spargeattn.kernels._triton.config import AttendConfig
    n, block_k = (1100, 32) if ON_GPU else (540, 16)
    monkeypatch.setattr(pipeline, "attend_config", lambda *key: AttendConfig(BlockShape(64, block_k), 4, 2))
    q, k, v = drifting_qkv(1, 1, n, 64, dtype=torch.float16, device=DEVICE)
    call = dict(params=TOPK, causal=causal, skipped="pooled")
    whole = check_call(q, k, v, **call)
    monkeypatch.setattr(blockmap, "_CHUNK", 32)
    monkeypatch.setattr(blockmap, "_SEARCHED", 32)
    monkeypatch.setattr(blockmap, "_RESIDENT", 32)
    assert torch.equal(check_call(q, k, v, **call).mask(), whole.mask())


EXTREMES = ("zeros", "constant", "zero values", "huge", "huge values", "tiny", "one token stands out", "equal keys")


@formats
@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes(kind, pv_dtype, small_blocks):
    q, k, v = drifting_qkv(1, 2, 150, 64, dtype=torch.float16, device=DEVICE)
    if kind == "zeros":
        q, k, v = (torch.zeros_like(x) for x in (q, k, v))
    elif kind == "constant":
        q, k, v = torch.full_like(q, 3.0), torch.full_like(k, -2.0), torch.full_like(v, 0.7)
    elif kind == "zero values":
        v = torch.zeros_like(v)
    elif kind == "huge":
        # Scores of a million: beyond, float32 no longer tells neighbouring exponents apart.
        q, k, v = q.sign() * 300, k.sign() * 300, v.sign() * 1e4
    elif kind == "huge values":
        v = v.clamp(-1, 1) * 6e4
    elif kind == "tiny":
        q, k, v = q * 1e-4, k * 1e-4, v * 1e-4
    elif kind == "one token stands out":
        k[:, :, 77] = 300.0
    else:
        k = k[:, :, :1].expand_as(k)
    check_call(q, k, v, params=CDF, pv_dtype=pv_dtype)


@formats
@pytest.mark.parametrize("rise", (10.0, 13.0, 31.0, 60.0, 300.0, -300.0))
@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_a_maximum_that_rises_from_block_to_block(skipped, rise, pv_dtype, small_blocks):
    """In INT8, sums are relative to the maximum of the first block, in 16 bits P to that of the row's own place and the
    first block; `rise`: from there to the last, in log2 units."""
    q, k, v = random_qkv(1, 2, 300, 32, dtype=torch.float32, device=DEVICE)
    q, k = 0.05 * q, 0.05 * k
    q[..., 0] = 1.0
    k[..., 0] = torch.linspace(0.0, rise, 300, device=DEVICE) / LOG2E
    check_call(q, k, v, params=SpargeParams(topk=0.9), pv_dtype=pv_dtype, skipped=skipped, scale=1.0)


@formats
@pytest.mark.parametrize("own", (-40.0, 3.0, 40.0))
@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_own_keys_that_are_not_kept(skipped, own, pv_dtype, small_blocks):
    """In 16 bits P is relative to the scores of those keys, although their block is left out; `own`: in log2 units."""
    q, _, v = random_qkv(1, 2, 300, 64, dtype=torch.float32, device=DEVICE)
    q[:, :, 1::2] = -q[:, :, ::2]  # means are zero but for the first channel, which lets the first blocks be kept
    k = q * own / (q * q).sum(-1, keepdim=True) / LOG2E
    q[..., 0], k[..., 0] = 1.0, torch.linspace(1.0, 0.0, 300, device=DEVICE)
    found = check_call(q, k, v, params=SpargeParams(topk=0.2), pv_dtype=pv_dtype, skipped=skipped, scale=1.0)
    assert not found.mask()[:, :, 3, 3 * found.block.q // found.block.k].any()

"""Preparation on its own: means, similarities, INT8 and its scales, the formats of V, the pooled tail's blocks."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockShape, reference
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, DTYPES, PV_FORMATS, tensors

BLOCK = BlockShape(64, 32)
N = 170  # the last block is ragged
FACTOR = 0.3
CASES = {
    "plain": {},
    "order": dict(order=torch.arange(N).flip(0)),
    "order per head": dict(order=torch.stack([torch.arange(N).roll(50), torch.arange(N).flip(0)])),
    "flags": dict(flagged=[(0, 3), (100, 101)]),
    "padding": dict(padding=torch.rand(2, N, generator=torch.Generator().manual_seed(0)) < 0.3),
    "whole blocks of padding": dict(padding=torch.arange(N).expand(2, -1) >= torch.tensor([[60], [0]])),
    "everything": dict(order=torch.arange(N).roll(50), flagged=[(20, 22)],
                       padding=torch.rand(2, N, generator=torch.Generator().manual_seed(0)) < 0.3),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
mixing = pytest.mark.parametrize("groups", (1, 8))
formats = pytest.mark.parametrize("dtype, dim", [(DTYPES[0], 64), (DTYPES[-1], 72), *((x, 128) for x in DTYPES[1:-1])])


def expected_tokens(x, block, order=None, flagged=(), padding=None, centre=False):
    """`reference.compress` of x (B, H, N, D) in float64, and the order as (H, N)."""
    heads = x.shape[1]
    order = None if order is None else order.to(DEVICE).expand(heads, -1)
    padding = None if padding is None else padding.to(DEVICE)[:, None].expand(-1, heads, -1)
    x = x.double() if padding is None else x.double().masked_fill(padding[..., None], 0.0)
    return reference.compress(reference._reorder(x, order), block, flags=reference._flags(flagged, order, heads, x),
                              padding=None if padding is None else reference._reorder(padding, order),
                              centre=centre), order


def flags_of(ranges):
    flags = torch.zeros(N, dtype=torch.int8, device=DEVICE)
    for start, stop in ranges:
        flags[start:stop] = 1
    return flags


def kernel_arguments(order=None, flagged=(), padding=None):
    return dict(order=None if order is None else order.int().to(DEVICE), flags=flags_of(flagged) if flagged else None,
                padding=None if padding is None else padding.to(DEVICE))


def check_similarity(similarity, expected):
    assert torch.equal(similarity == -torch.inf, expected.always.expand_as(similarity))
    assert_near(similarity.where(similarity > -torch.inf, 0.0),
                expected.similarity.where(~expected.always, 0.0), atol=1e-5, what="similarity")


def check_int8(quantised, step, expected, what):
    """Symmetric INT8 of `expected` (..., D) with `step` broadcast over it: largest value 127, half a step of error."""
    dim = expected.shape[-1]
    assert quantised.dtype == torch.int8 and not bool(quantised[..., dim:].any()), f"{what}: padded channels"
    assert_near(quantised[..., :dim].double() * step.double(), expected,
                atol=step.double() * 0.5 * (1 + 1e-3) + expected.abs() * 1e-5, what=what)


def check_step(step, expected, dims, factor=1.0, least=1e-12):
    largest = expected.abs().amax(dims)
    assert_near(step, largest.clamp(min=least) / 127 * factor, atol=largest * 3e-7 * factor + 1e-18, what="step")


def mixed(x, groups, power):
    """x (..., D) with its channels mixed as the kernels do; their scales bring it to groups^power times a rotation."""
    return reference._mixed(x, groups) * groups ** power


@cases
@formats
@mixing
def test_queries(groups, dtype, dim, case):
    groups = min(groups, 8 if dim & (dim - 1) == 0 else 1)
    from comfyui_spargeattn.kernels._triton.prepare_queries import prepare_queries
    q, k, v = drifting_qkv(2, 4, N, dim, kv_heads=2, dtype=dtype, device=DEVICE)
    case = {name: value for name, value in case.items() if name != "padding"}
    found = tensors(prepare_queries(q, k, v, factor=FACTOR, block=BLOCK, groups=groups, **kernel_arguments(**case))[0])
    if case.get("order") is not None and case["order"].ndim == 2:
        case["order"] = case["order"].repeat_interleave(2, 0)  # one row a key head serves two query heads
    expected, _ = expected_tokens(q, BLOCK.q, **case)
    assert_near(found.mean, expected.mean, atol=1e-5, what="mean")
    check_similarity(found.similarity, expected)
    tokens = mixed(expected.tokens.flatten(2, 3), groups, 0.5)
    check_step(found.scale, tokens, -1, FACTOR)
    check_int8(found.quantised, found.scale[..., None] / FACTOR, tokens, "q")
    assert bool((found.quantised.abs().amax(-1) == 127)[:, :, :N].all()), "the range is not used"


def prepared_keys(k, v, *, pv_int8, pooled, flags=None, groups=1, key_group=16, judged=True, **arguments):
    """Keys, values and what the queries' launch sampled of them, as tensors."""
    from comfyui_spargeattn.kernels._triton.prepare_keys import prepare_keys
    from comfyui_spargeattn.kernels._triton.prepare_queries import prepare_queries
    _, statistics = prepare_queries(k, k, v, factor=FACTOR, block=BLOCK, flags=None, **arguments)
    keys, values = prepare_keys(k, v, statistics, block=BLOCK, pv_int8=pv_int8, pooled=pooled, flags=flags,
                                groups=groups, key_group=key_group, judged=judged, **arguments)
    return tensors(keys), values and tensors(values), tensors(statistics)


def pooled_terms(keys):
    """What the numbers of pooled keys are multiplied by, and what is added to their scores; both (B, Hkv, k_blocks)."""
    terms = keys.pooled_terms[..., :keys.count.shape[-1]]
    return terms.view(torch.float32), terms.to(torch.int16).view(torch.float16).float()


@cases
@formats
@pytest.mark.parametrize("pv_dtype, groups, key_group", [("fp16", 1, 16), ("int8", 8, 16), ("int8", 1, 32)])
def test_keys_and_values(pv_dtype, groups, key_group, dtype, dim, case):
    groups = min(groups, 8 if dim & (dim - 1) == 0 else 1)
    pv_int8 = pv_dtype == "int8"
    _, k, v = drifting_qkv(2, 2, N, dim, dtype=dtype, device=DEVICE)
    k, v = k + 3, v * torch.linspace(0.1, 30.0, dim, device=DEVICE).to(dtype)
    if case.get("padding") is not None:  # NaN there must reach nothing
        k, v = (x.masked_fill(case["padding"].to(DEVICE)[:, None, :, None], torch.nan) for x in (k, v))
    keys, values, _ = prepared_keys(k, v, pv_int8=pv_int8, pooled=True, groups=groups, key_group=key_group,
                                    **kernel_arguments(**case))

    expected, order = expected_tokens(k, BLOCK.k, **case, centre=True)
    assert torch.equal(keys.count, expected.valid.sum(-1).expand_as(keys.count))
    if case.get("padding") is None:
        assert keys.valid is None
    else:
        assert torch.equal(keys.valid != 0, expected.valid.flatten(2))
    assert_near(keys.mean, expected.mean, atol=1e-5, what="mean")
    check_similarity(keys.similarity, expected)
    tokens, means = (mixed(x, groups, -0.5) for x in (expected.tokens, expected.mean))
    least = 1e-12 / groups
    check_step(keys.scale, tokens, (-2, -1), least=least)
    check_int8(keys.quantised.unflatten(2, (-1, BLOCK.k)), keys.scale[..., None, None], tokens, "k")
    largest = means.abs().amax(-1).clamp(min=least)
    pooled_scale, weight = pooled_terms(keys)
    assert bool((pooled_scale * 127 >= largest * (1 - 1e-6)).all()), "a pooled key does not fit"
    assert bool((pooled_scale * 127 <= largest * (1 + 2 ** -6)).all()), "the range is not used"
    check_int8(keys.pooled, pooled_scale[..., None], means, "pooled k")
    torch.testing.assert_close(weight, keys.count.clamp(min=1).log2(), rtol=2e-3, atol=0)

    padding = None if case.get("padding") is None else case["padding"].to(DEVICE)[:, None, :, None]
    v = v.double() if padding is None else v.double().masked_fill(padding, 0.0)
    exists = torch.ones_like(v, dtype=torch.bool) if padding is None else (~padding).expand_as(v)
    centre = v.sum(2) / exists.sum(2).clamp(min=1)
    assert_near(values.centre, centre, atol=v.abs().amax(2) * 1e-6, what="centre of V")
    v = (v - values.centre.double()[:, :, None]) * exists
    largest = v.abs().amax(2)
    assert_near(values.scale, largest.clamp(min=1e-12), atol=largest * 1e-5 + 1e-18, what="scale of V")
    blocks = reference._blocks(reference._reorder(v, order), BLOCK.k) / values.scale.double()[:, :, None, None]
    count = keys.count.clamp(min=1)[..., None].double()
    means = blocks.sum(3) / count
    assert_near(values.pooled[..., :dim], means, atol=means.abs() * 2 ** -8 + 2 ** -20, what="pooled V")
    assert not bool(values.pooled[..., dim:].any())
    if pv_int8:
        # A group is tiles of 8 keys, each of which a quad of lanes holds in pairs; a lane's come together.
        tiles = torch.arange(key_group, device=DEVICE).reshape(-1, 4, 2)
        permutation = tiles.transpose(0, 1).flatten()
        stored = values.values.mT.unflatten(2, (-1, key_group))  # [B, H, n, key_group, D]
        plain = torch.empty_like(stored)
        plain[:, :, :, permutation] = stored
        check_step(values.block_scale, blocks, (-2, -1))
        check_int8(plain.flatten(2, 3).unflatten(2, (-1, BLOCK.k)), values.block_scale[..., None, None], blocks, "v")
    else:
        assert bool((values.block_scale == 1).all())
        stored = values.values.unflatten(2, (-1, BLOCK.k))
        assert not bool(stored[..., dim:].any())
        assert_near(stored[..., :dim], blocks, atol=blocks.abs() * 2 ** -11 * 1.001 + 2 ** -24, what="V in float16")


def test_keys_without_values():
    _, k, v = drifting_qkv(1, 2, N, 64, device=DEVICE)
    arguments = dict(order=None, padding=None, pv_int8=False, pooled=False)
    alone, nothing, _ = prepared_keys(k, None, **arguments)
    both, _, _ = prepared_keys(k, v, **arguments)
    assert nothing is None and alone.pooled is None and alone.pooled_terms is None
    assert torch.equal(alone.quantised, both.quantised) and torch.equal(alone.mean, both.mean)
    assert torch.equal(alone.similarity, both.similarity)


def test_similarity_is_left_out_where_nothing_asks_for_it():
    """It is 1 then, but still tells blocks with flags and with numbers that are not finite; all else stays."""
    from comfyui_spargeattn.kernels._triton.prepare_queries import prepare_queries
    q, k, v = drifting_qkv(1, 2, N, 64, device=DEVICE)
    q[:, 0, 70], k[:, 1, 40] = torch.inf, torch.nan
    flags = flags_of([(130, 131)])
    arguments = dict(order=None, padding=None)

    def queries(judged):
        return tensors(prepare_queries(q, k, v, factor=FACTOR, block=BLOCK, flags=flags, judged=judged, **arguments)[0])

    def keys(judged):
        return prepared_keys(k, v, pv_int8=False, pooled=True, flags=flags, judged=judged, **arguments)[0]

    for prepare in (queries, keys):
        asked, not_asked = prepare(True), prepare(False)
        cosine = asked.similarity.abs() < 1
        assert bool(cosine.any()) and bool(asked.similarity.isnan().any()) and bool(asked.similarity.isneginf().any())
        asked.similarity[cosine] = 1
        for name, x in vars(asked).items():
            if x is not None:
                torch.testing.assert_close(getattr(not_asked, name), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pv_int8", (False, True))
def test_programs_of_several_blocks_write_the_same(pv_int8, monkeypatch):
    from comfyui_spargeattn.kernels._triton import prepare_keys
    _, k, v = drifting_qkv(1, 2, N, 64, device=DEVICE)
    arguments = dict(order=None, padding=None, pv_int8=pv_int8, pooled=True)
    one = prepared_keys(k, v, **arguments)
    monkeypatch.setattr(prepare_keys, "_LEAST_PROGRAMS", 1)  # six blocks: programs of four and of two
    several = prepared_keys(k, v, **arguments)
    for before, after in zip(one[:2], several[:2]):
        for name, x in vars(before).items():
            if x is not None and name != "channel_scale":  # which only blocks with outliers have
                assert torch.equal(x, getattr(after, name)), name


def test_long_sequences_are_sampled(monkeypatch):
    """Beyond SAMPLE tokens the constants come from an even sample, without the padding in it."""
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", 256)
    n = 2 * sample.SAMPLE + 77
    _, k, v = drifting_qkv(1, 1, n, 16, device=DEVICE)
    v += 1.0
    padding = torch.arange(n, device=DEVICE)[None] >= n // 2
    for mask in (None, padding):
        keys, values, sampled = prepared_keys(k, v, pv_int8=False, pooled=False, order=None, padding=mask)
        valid = n if mask is None else n // 2
        assert abs(int(sampled.sampled.sum()) - sample.SAMPLE * valid / n) <= 3
        centre = v[:, :, :valid].mean(2)
        assert_near(values.centre, centre, atol=v.std() * 3 / sample.SAMPLE ** 0.5, what="centre of V")
        restored = values.values[..., :v.shape[-1]] * values.block_scale.repeat_interleave(BLOCK.k, -1)[..., None]
        restored = restored * values.scale[:, :, None] + values.centre[:, :, None]
        exact = v if mask is None else v[:, :, :valid]
        assert_near(restored[:, :, :valid], exact, atol=exact.abs() * 2 ** -9 + 1e-3, what="V")


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_values_beyond_the_sample_keep_their_size(pv_dtype, monkeypatch):
    from comfyui_spargeattn.kernels._triton import sample
    monkeypatch.setattr(sample, "SAMPLE", 256)
    n = 2 * sample.SAMPLE
    _, k, v = drifting_qkv(1, 1, n, 16, device=DEVICE)
    place = torch.arange(sample.SAMPLE, dtype=torch.int64)
    taken = set((((place * 2654435769) & 0xFFFFFFFF) * n >> 32).tolist())
    outlier = next(token for token in range(n // 2, n) if token not in taken)
    v[:, :, outlier] *= 1e6
    _, values, _ = prepared_keys(k, v, pv_int8=pv_dtype == "int8", pooled=True, order=None, padding=None)
    block = outlier // BLOCK.k
    scale = values.block_scale[0, 0, block]
    assert scale > 1 and (values.block_scale > 1).sum() == 1
    if pv_dtype == "int8":
        scale = values.channel_scale[0, 0, block]
    assert bool(values.values.float().isfinite().all()) and bool(values.pooled.isfinite().all())
    stored = values.values.float()[0, 0]  # (n, pitch) in float16, (D, n) in int8
    rows = (stored[:, :16] if pv_dtype == "fp16" else stored.mT)[block * BLOCK.k:(block + 1) * BLOCK.k]
    row = rows.abs().amax(0)
    assert_near(row * scale * values.scale[0, 0],
                (v[0, 0, outlier] - values.centre[0, 0]).abs(),
                atol=v[0, 0, outlier].abs() * 2 ** -4 + 1, what="the outlier")


@pytest.mark.parametrize("triton, expected", [(None, 16), ((3, 3), 16), ((3, 4), 32), ((3, 7), 32), ((3, 8), 16)])
def test_order_of_int8_values_by_version_of_triton(triton, expected, monkeypatch):
    """mma.sync's INT8 operands differ; wgmma's (H100) do not, nor others'."""
    from comfyui_spargeattn.kernels._triton import config
    monkeypatch.setattr(config, "triton_version", lambda: triton)
    chosen = {arch: config.attend_config.__wrapped__(arch, 128, "int8").key_group
              for arch in ("sm80", "sm86", "sm89", "sm120", "sm90", "sm100", "gfx942", "interpreter")}
    assert chosen == dict.fromkeys(("sm80", "sm86", "sm89", "sm120"), expected) | dict.fromkeys(
        ("sm90", "sm100", "gfx942", "interpreter"), 16)

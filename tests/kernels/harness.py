"""What the kernel tests share: the device and its number formats, and the comparison of a whole call."""
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import BlockMap, SpargeParams, SpargeStats, reference, sparge_attention
from comfyui_spargeattn.kernels.capability import arch_of, supports_fp8
from comfyui_spargeattn.tests.assertions import assert_within_budget

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter neither multiplies bfloat16 nor rounds to float8 correctly.
DTYPES = (torch.float16, torch.bfloat16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
PV_FORMATS = ("fp16", "fp8") if ON_GPU and supports_fp8(arch_of(torch.device("cuda"))) else ("fp16",)
# Distance to the λ test's limit, in log2 units, that one INT8 rounding can make up.
_UNDECIDED = 0.02
_WHOLE_SAMPLE = 4096


def tensors(prepared):
    """A dataclass of the kernels' regions of memory with torch tensors in their place."""
    return SimpleNamespace(**{name: None if region is None else region.tensor()
                              for name, region in vars(prepared).items()})


@contextmanager
def recorded_maps():
    """The block maps of the calls inside, as the attention kernel receives them."""
    from comfyui_spargeattn.kernels._triton import pipeline
    maps, attend = [], pipeline.attend

    def record(queries, keys, values, lists, out, **call):
        maps.append(lists.public(call["config"].block))
        return attend(queries, keys, values, lists, out, **call)

    with mock.patch.object(pipeline, "attend", record):
        yield maps


def reference_with(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, **call) -> tuple[Tensor, SpargeStats]:
    """The eager reference with a block map given."""
    with mock.patch.object(reference, "predict_map", lambda *args: mask):
        out, _, stats = reference.sparge_attention(q, k, v, **call)
    return out, stats


def check_call(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams = SpargeParams(), pv_dtype: str = "fp16",
               layout: str = "BHND", min_kept: float = 0.0, max_kept: float = 1.0,
               min_skipped: float = 0.0, **call) -> BlockMap:
    """Run the kernels and hold the output and the statistics against the reference with the kernels' own block map.

    The error against float64 may be that of the eager emulation of the same number formats, and rounding. The emulation
    takes its constants from all tokens, so the kernels sample all of them here.
    """
    from comfyui_spargeattn.kernels._triton import prepare
    assert k.shape[1 if layout == "BNHD" else 2] <= _WHOLE_SAMPLE
    with recorded_maps() as maps, mock.patch.object(prepare, "SAMPLE", _WHOLE_SAMPLE):
        out, stats = sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, layout=layout, impl="triton",
                                      return_stats=True, **call)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    if layout == "BNHD":
        q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    mask = maps[0].mask()
    expected_lists = BlockMap.from_mask(mask, maps[0].block)
    listed = torch.arange(mask.shape[-1], device=mask.device) < maps[0].counts[..., None]
    assert torch.equal(maps[0].counts, expected_lists.counts)
    assert torch.equal(maps[0].indices.where(listed, 0), expected_lists.indices.where(listed, 0)), "not ascending"

    call["block"] = maps[0].block
    unskipped = SpargeParams(**dict(params.items()) | dict(pv_threshold=float("inf")))
    exact, _ = reference_with(mask, q.double(), k.double(), v.double(), params=unskipped, **call)
    with undecided_groups() as undecided:
        emulated, expected = reference_with(mask, q.float(), k.float(), v.float(), params=params, quantise=pv_dtype,
                                            **call)
    assert_within_budget(out, emulated, exact)
    if min_skipped:  # what the λ test drops is most of this error, and both must drop the same
        assert rms(out - emulated) <= 0.5 * rms(emulated - exact) + rms(exact) * torch.finfo(out.dtype).eps
    torch.testing.assert_close(stats.kept, expected.kept, rtol=0, atol=1e-6)
    groups = (mask.sum((-2, -1)) * (maps[0].block.q // reference.ROW_GROUP)).clamp(min=1)
    allowed = torch.stack(undecided).sum(0) / groups + 1e-6
    assert bool(((stats.pv_skipped - expected.pv_skipped).abs() <= allowed).all()), (
        f"pv_skipped {stats.pv_skipped.tolist()}, expected {expected.pv_skipped.tolist()} ± {allowed.tolist()}")
    kept = stats.kept.mean().item()
    assert min_kept <= kept <= max_kept, f"kept {kept}: the case does not test what it is meant to"
    assert stats.pv_skipped.mean().item() >= min_skipped, "the λ test hardly fired"
    return maps[0]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@contextmanager
def undecided_groups():
    """Per query block, how many row groups (B, H) lie so near the λ test's limit that rounding decides."""
    counts, original = [], reference._skipped_groups

    def record(local, running, limit):
        below = (local - running).unflatten(2, (-1, reference.ROW_GROUP)).amax(3)
        counts.append(((below + limit).abs() < _UNDECIDED).sum((-2, -1)))
        return original(local, running, limit)

    with mock.patch.object(reference, "_skipped_groups", record):
        yield counts

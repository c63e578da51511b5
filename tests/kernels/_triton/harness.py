"""What the kernel tests share: the device, its number formats and its memory, and the comparison of a whole call."""
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import BlockMap, SpargeParams, SpargeStats, reference, sparge_attention
from comfyui_spargeattn.kernels.call import centred_bias
from comfyui_spargeattn.kernels.formats import LOG2E, ROW_GROUP
from comfyui_spargeattn.kernels.reference import Compressed, Visibility
from comfyui_spargeattn.tests.assertions import assert_within_budget
from comfyui_spargeattn.tests.kernels import eager

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter does not multiply bfloat16.
DTYPES = (torch.float16, torch.bfloat16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
PV_FORMATS = ("fp16", "int8")
# (layout, format of P·V): all on a GPU, each once in the interpreter, where a call takes seconds.
LAYOUTS_AND_FORMATS = [(layout, pv_dtype) for layout, usual in (("BHND", "int8"), ("BNHD", "fp16"))
                       for pv_dtype in (PV_FORMATS if ON_GPU else (usual,))]
# Distance to the λ test's limit, in log2 units, that one INT8 rounding can make up.
_UNDECIDED = 0.02


def tensors(prepared):
    """A dataclass of the kernels' regions of memory with torch tensors in their place."""
    return SimpleNamespace(**{name: None if region is None else region.tensor()
                              for name, region in vars(prepared).items()})


@contextmanager
def recorded_maps():
    """The block maps of the calls inside, as the attention kernel receives them."""
    from comfyui_spargeattn.kernels._triton import pipeline, replay
    maps, attend = [], pipeline.attend

    def record(queries, keys, values, lists, out, **call):
        maps.append(lists.public(call["config"].block))
        return attend(queries, keys, values, lists, out, **call)

    with mock.patch.object(pipeline, "attend", record), replay.off():
        yield maps


@contextmanager
def poisoned_memory():
    """Fill what is allocated without a value with NaN, or with a number no kernel means: reading it shows."""
    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.dtype == torch.uint8:
                x.fill_(0xFF)  # NaN in every floating format
            elif x.is_floating_point():
                x.fill_(torch.nan)
            elif x.dtype != torch.bool:
                x.fill_(-99)
            return x
        return allocate_poisoned

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


@contextmanager
def faster_interpreter():
    """Triton's interpreter adapts the whole language anew at every call of a device function, a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter
    adapt = interpreter._patch_lang

    def adapt_once(function):
        modules = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        return adapt(function) if any(tl.core.is_builtin(module.load) for module in modules) else None

    with mock.patch.object(interpreter, "_patch_lang", adapt_once):
        yield


def reference_with(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, **call) -> tuple[Tensor, SpargeStats, tuple]:
    """The eager reference with a block map given, and what it would have predicted the map from."""
    asked = []

    def given(*args):
        asked.append(args)
        return mask

    with mock.patch.object(reference, "_map_of", given):
        out, _, stats = eager.sparge_attention(q, k, v, **call)
    return out, stats, asked[0]


def map_bounds(queries: Compressed, keys: Compressed, rules: Visibility, params: SpargeParams, scale: float, *,
               similarity_slack: float | Tensor = 0.0, offset: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """(must, may), bool (B, H, nq, nk): blocks that every right map keeps, and that some right map keeps.

    A chosen block is one whose better blocks do not reach the target yet, up to rounding of the scores. A block whose
    similarity lies within `similarity_slack` of the threshold leaves its row, or all rows that see it, undecided.
    offset: what was subtracted from each key, (B, H, 1, D); its rounding stays in the scores.
    """
    amount, theta = (reference._per_head(x, queries.mean.double(), 4)
                     for x in (params.amount, params.similarity_threshold))
    if params.selection == "topk":
        theta = torch.full_like(theta, -1.0)  # the judge is for cdf
    visible, partial = rules.visible, rules.partial
    key_similarity, query_similarity = keys.similarity[:, :, None].double(), queries.similarity[..., None].double()
    ruled = visible & (partial | keys.always[:, :, None] | queries.always[..., None]
                       | (key_similarity < theta) | (query_similarity < theta))
    judged = visible & ~partial & ~keys.always[:, :, None] & ~(key_similarity < theta)

    factor = scale * LOG2E
    q, k = queries.mean.double(), keys.mean.double()
    bias = keys.mean_bias.double()[:, :, None]
    scores = q @ k.mT * factor + bias
    magnitude = (q.abs() @ k.abs().mT).amax(-1, keepdim=True) * (1e-3 if ON_GPU else 2e-6)  # TF32 there
    magnitude = magnitude + (q.abs() * offset).sum(-1, keepdim=True) * 1e-6
    rounding = magnitude * abs(factor) + 2e-7  # the last: float32's in exponentials near one
    rounding = rounding + bias.abs().amax(-1, keepdim=True) * 1e-6
    scores = scores.masked_fill(~judged, -torch.inf)
    if params.selection == "cdf":
        mass = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp2()
        target, slack = amount * mass.sum(-1, keepdim=True), (1e-5 + rounding) * mass.sum(-1, keepdim=True)
    else:
        mass = judged.double()
        target = (amount * visible.sum(-1, keepdim=True) - 1e-3).ceil().minimum(mass.sum(-1, keepdim=True))
        slack = torch.zeros_like(target)

    def better(margin):
        """Mass of the blocks whose score exceeds a block's own by more than `margin`."""
        return ((scores[..., None, :] > scores[..., :, None] + margin[..., None]) * mass[..., None, :]).sum(-1)

    every = judged & (amount >= 1)
    must = ruled | every | (judged & (better(-rounding) - mass < target - slack))
    may = ruled | every | (judged & (better(rounding) < target + slack))
    if params.selection == "topk":
        return must, may
    undecided = (visible & ((key_similarity - theta).abs() <= similarity_slack)).any(-1, keepdim=True)
    undecided = undecided | ((query_similarity - theta).abs() <= similarity_slack)
    certain = visible & (partial | keys.always[:, :, None] | queries.always[..., None]
                         | (key_similarity < theta - similarity_slack) | (query_similarity < theta - similarity_slack))
    return torch.where(undecided, certain, must), torch.where(undecided, visible, may)


def check_map(mask: Tensor, asked: tuple, *, offset: Tensor) -> float:
    """Hold a map of the kernels against the definition, given what the reference predicts from.

    Returns the share of blocks that rounding decides.
    """
    queries, keys, _, rules, call = asked
    params, scale = call.thresholds, call.scale_for(queries.mean.shape[-1])
    # Where keys hardly differ from what they share, their direction is rounding of what was subtracted.
    spread = keys.tokens.square().sum((2, 3)) / keys.valid.sum((2, 3)).clamp(min=1)[..., None]
    noise = offset.square().sum(-1) / spread.sum(-1, keepdim=True).clamp(min=1e-300)
    must, may = map_bounds(queries, keys, rules, params, scale, offset=offset,
                           similarity_slack=1e-5 * (1 + noise.sqrt())[..., None])
    for what, wrong in (("missing", must & ~mask), ("too many", mask & ~may)):
        assert not bool(wrong.any()), f"{what}: {wrong.sum().item()} blocks, the first at {wrong.nonzero()[0].tolist()}"
    return (may & ~must).double().mean().item()


def sampled_tokens(n: int, device: torch.device) -> Tensor:
    """The tokens out of n that the kernels find their constants from."""
    from comfyui_spargeattn.kernels._triton import sample
    place = torch.arange(min(n, sample.SAMPLE), device=device)
    return place if n <= sample.SAMPLE else ((place * 2654435769) & 0xFFFFFFFF) * n >> 32


def sampled_mean(x: Tensor, padding: Tensor | None) -> Tensor:
    """What the kernels subtract from x (B, H, N, D): the mean of the sampled tokens that exist, (B, H, 1, D)."""
    tokens = sampled_tokens(x.shape[2], x.device)
    x = x[:, :, tokens]
    if padding is None:
        return x.mean(2, keepdim=True)
    padding = padding[:, None, tokens, None]
    return x.masked_fill(padding, 0.0).sum(2, keepdim=True) / (~padding).sum(2, keepdim=True).clamp(min=1)


def hidden_keys(call: dict) -> Tensor | None:
    """bool (B, Nk), the keys that count as padding."""
    padding = call.get("key_padding_mask")
    if call.get("key_bias") is None:
        return padding
    return centred_bias(call["key_bias"].float(), padding, call.get("causal", False))[1]


def sampled_centre_and_spread(v: Tensor, padding: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """What the kernels take for the centre and the spread of v (B, Hkv, N, D), both (B, H, 1, 1, D)."""
    v = v.double()
    centre = sampled_mean(v, padding)
    tokens = sampled_tokens(v.shape[2], v.device)
    distance = (v[:, :, tokens] - centre).abs()
    if padding is not None:
        distance = distance.masked_fill(padding[:, None, tokens, None], 0.0)
    spread = distance.amax(2, keepdim=True)
    return tuple(x.float().repeat_interleave(group, 1)[:, :, None] for x in (centre, spread))


@contextmanager
def keys_less(constant: Tensor):
    """The reference with `constant` (B, Hkv, 1, D) subtracted from the keys, where it takes the mean of all."""
    original = reference.compress

    def compress(x, *args, centre=False, **call):
        return original(x - constant.to(x.dtype) if centre else x, *args, **call)

    with mock.patch.object(reference, "compress", compress):
        yield


@dataclass(frozen=True)
class Checked:
    """What a call came to: the kernels' map, the share of its blocks that rounding decides, and the error as a share
    of what it may be."""

    map: BlockMap
    undecided: float
    ratio: float


def check_call(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams = SpargeParams(), pv_dtype: str = "fp16",
               layout: str = "BHND", min_kept: float = 0.0, max_kept: float = 1.0,
               min_skipped: float = 0.0, **call) -> BlockMap:
    """Run the kernels and hold the map, the output and the statistics against the reference."""
    with recorded_maps() as maps:
        out, stats = sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, layout=layout, impl="triton",
                                      return_stats=True, **call)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    if layout == "BNHD":
        q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    check_output(q, k, v, out, stats, maps[0], params=params, pv_dtype=pv_dtype,
                 tight=bool(min_skipped) and pv_dtype == "fp16", **call)
    kept = stats.kept.mean().item()
    assert min_kept <= kept <= max_kept, f"kept {kept}: the case does not test what it is meant to"
    assert stats.pv_skipped.mean().item() >= min_skipped, "the λ test hardly fired"
    return maps[0]


def check_output(q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: SpargeStats | None, found: BlockMap, *,
                 params: SpargeParams, pv_dtype: str, block_mask: Tensor | None = None, tight: bool = False,
                 rms_slack: float = 1.05, max_slack: float = 1.5, ties: int = 1, **call) -> Checked:
    """Hold what the kernels gave for q (B, H, Nq, D), k and v (B, Hkv, Nk, D) against the reference.

    found: the map they used; it may differ from the reference's only where rounding decides, or from `block_mask` only
    where nothing can be attended. The error against float64 over the same map may be that of the eager emulation of the
    same number formats, and rounding. tight: what the λ test drops is most of that error, and both must drop the same.
    ties: how many numbers of a row of q and of k may round to INT8 the other way.
    """
    from comfyui_spargeattn.kernels._triton import pipeline
    mask = found.mask()
    lists = BlockMap.from_mask(mask, found.block)
    listed = torch.arange(mask.shape[-1], device=mask.device) < found.counts[..., None]
    assert torch.equal(found.counts, lists.counts), "a block is listed twice"
    assert torch.equal(found.indices.where(listed, 0), lists.indices.where(listed, 0)), "not ascending"

    call["block"] = found.block
    if block_mask is not None:  # with a map that was given, channels are not mixed, whatever the thresholds
        params = SpargeParams(topk=0.5, pv_threshold=params.pv_threshold)
    constant = sampled_mean(k.double(), hidden_keys(call))
    sampled = sampled_centre_and_spread(v, hidden_keys(call), q.shape[1] // k.shape[1])
    as_sampled = partial(mock.patch.object, reference, "_centre_and_spread", lambda *args: sampled)
    unskipped = SpargeParams(**dict(params.items()) | dict(pv_threshold=float("inf")))
    with keys_less(constant):
        exact, _, asked = reference_with(mask, q.double(), k.double(), v.double(), params=unskipped, **call)
        with undecided_groups(ties * _one_rounding(q, k, constant, call.get("scale"))) as near, as_sampled():
            emulate = partial(reference_with, mask, q.float(), k.float(), v.float(), params=params, pv_dtype=pv_dtype,
                              **call)
            emulated, expected, _ = emulate()
        draws = [emulated]
        if pv_dtype == "int8":
            for turn in range(1, 4):
                with as_sampled(), other_chances(turn):
                    draws.append(emulate()[0])
    if block_mask is None:
        undecided = check_map(mask, asked, offset=constant.abs().repeat_interleave(q.shape[1] // k.shape[1], 1))
    else:
        undecided, given = 0.0, (block_mask & asked[3].visible).expand_as(mask)
        assert torch.equal(mask, given), "not the map that was given"
    floor = 1e-18  # the kernels take no channel of V to vary by less than 1e-12
    assert bool(out.isfinite().all()), "not finite"
    # A row whose group the λ test may skip or not has two right results.
    undecided_rows = torch.cat([x.any(-1) for x in near], 2).repeat_interleave(ROW_GROUP, 2)
    decided = ~undecided_rows[:, :, :out.shape[2], None]
    compared = (x.where(decided, exact.to(x.dtype)) for x in (out, torch.stack(draws)))
    chance = 0.0
    if pv_dtype == "int8":  # one draw is as near the mean of many as there are rows that the error comes from
        rms_slack, max_slack = rms_slack + 2 * _effective_rows(emulated - exact) ** -0.5, max_slack + 0.5
        chance = 2 / 127 * v.float().nan_to_num(0.0, 0.0, 0.0).std().item()  # a probability, up against all odds
    sums = torch.float16 if pipeline._configure(q, pv_dtype)[0].fp16_sums else torch.float32
    ratio = assert_within_budget(*compared, exact, rms_slack=rms_slack, max_slack=max_slack, floor=floor, chance=chance,
                                 sums=sums)
    if tight:
        assert rms(out - emulated) <= 0.5 * rms(emulated - exact) + rms(exact) * torch.finfo(out.dtype).eps
    if stats is not None:
        torch.testing.assert_close(stats.kept, expected.kept, rtol=0, atol=1e-6)
        groups = (mask.sum((-2, -1)) * (found.block.q // ROW_GROUP)).clamp(min=1)
        allowed = sum(x.sum((-2, -1)) for x in near) / groups + 1e-6
        assert bool(((stats.pv_skipped - expected.pv_skipped).abs() <= allowed).all()), (
            f"pv_skipped {stats.pv_skipped.tolist()}, expected {expected.pv_skipped.tolist()} ± {allowed.tolist()}")
    return Checked(found, undecided, ratio)


@contextmanager
def other_chances(turn: int):
    """The emulation of INT8 with other bytes to round P by: the kernels' come from last bits, which differ from the
    emulation's."""
    original = reference._up_or_down
    with mock.patch.object(reference, "_up_or_down", lambda p, local: original(p, (local.float().contiguous().view(
            torch.int32) + turn).view(torch.float32))):
        yield


def _effective_rows(error: Tensor) -> float:
    """(Σe²)² / Σe⁴ of the errors e of rows (..., D): as many rows as there are, if all err alike, down to one."""
    square = error.double().square().sum(-1)
    return (square.sum().square() / square.square().sum().clamp(min=1e-300)).clamp(min=1.0).item()


def _one_rounding(q: Tensor, k: Tensor, constant: Tensor, scale: float | None) -> float:
    """What one number of q and one of k rounded the other way to INT8 move a score by, in log2 units."""
    largest = (q.float().abs().amax() * (k.double() - constant).abs().amax()).item()
    return max(_UNDECIDED, 2 / 127 * largest * abs(q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@contextmanager
def undecided_groups(margin: float = _UNDECIDED):
    """Per query block, which row groups lie so near the λ test's limit in which blocks that rounding decides: bool
    (B, H, groups, nk)."""
    found, original = [], reference._skipped_groups

    def record(local, running, limit):
        below = (local - running).unflatten(2, (-1, ROW_GROUP)).amax(3)
        found.append((below + limit).abs() < margin)
        return original(local, running, limit)

    with mock.patch.object(reference, "_skipped_groups", record):
        yield found

"""Where visual tokens lie, as found by the pack, against where each model really puts them.

The truth comes from the model itself: patches of the latent are numbered, and for each binary digit one batch item has
the patches changed whose number has it. Tokens that change in the right items are the patches' tokens; those that never
change are text, references or padding. Neither the pack's rules nor the model's position ids take part.
"""
import copy
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import checkpoints
import comfy_host
import pytest
import torch
from bare_models import BARE, Evaluation, batched
from checkpoints import FAMILIES, MIN_TOKENS
from sampling import CONSERVATIVE, SPARSE, apply, condition, relative_l1, sample

SLOT = "optimized_attention_override"
# (1, 2, 2) elsewhere
PATCHES = {"ltxv": (1, 1, 1), "ltx2": (1, 1, 1), "hunyuan_video_1.5": (1, 1, 1), "flux2": (1, 1, 1)}
ODD = {"wan": (1, 16, 3, 31, 33), "flux": (1, 16, 47, 51), "sd3.5": (1, 16, 47, 51), "qwen_image": (1, 16, 1, 47, 51),
       "hunyuan_video": (1, 16, 3, 32, 34), "lumina2": (1, 16, 47, 51), "ltxv": (1, 128, 3, 15, 17),
       "minimax_h3": (1, 24, 3, 31, 33), "ltx2": (1, 128, 3, 15, 17), "flux2": (1, 128, 23, 25),
       "z_image": (1, 16, 47, 51), "kandinsky5": (1, 16, 3, 32, 36), "wan_s2v": (1, 16, 3, 31, 33),
       "cosmos_predict2": (1, 16, 3, 31, 33)}


@dataclass
class Recorded:
    """An attention call: q (B, tokens, features), the pack's layout (or why it has none), and that layout's order."""

    q: torch.Tensor
    layout: object
    order: torch.Tensor | None


class Recorder:
    """An override that asks the pack for the layout of every long self-attention call, and computes it densely."""

    def __init__(self, comfy_nodes):
        self.arguments, self.layouts = (comfy_host.pack_module(comfy_nodes, f"nodes.call.{name}")
                                        for name in ("arguments", "token_layout"))
        self.calls = []

    def __call__(self, func, *args, **kwargs):
        call = self.arguments.AttentionCall.parse(args, kwargs)
        if call.q_tokens == call.k_tokens >= MIN_TOKENS:
            layout = self.layouts.token_layout(call.q_tokens, call.transformer_options)
            q = call.q if call.layout == "BNHD" else call.q.transpose(1, 2)
            order = None if isinstance(layout, str) else layout.order("hilbert", q.device)
            self.calls.append(Recorded(q.flatten(2).float(), layout, order))
        return func(*args, **kwargs)


def patch_grid(shape, patch):
    sizes = (1, *shape[2:]) if len(shape) == 4 else tuple(shape[2:])
    return tuple(math.ceil(n / p) for n, p in zip(sizes, patch))


def numbered(shape, patch, seed=0):
    """Latents (1 + digits, C, …): noise, and for each binary digit the same with the patches changed that have it."""
    # The change has no direction in common, so that its sum over many tokens, which attention spreads, stays small.
    noise, change = torch.randn(2, 1, *shape[1:], generator=torch.Generator().manual_seed(seed))
    grid = patch_grid(shape, patch)
    numbers = torch.arange(1, math.prod(grid) + 1).view(grid)
    for axis, size in enumerate(patch):
        numbers = numbers.repeat_interleave(size, axis)
    if len(shape) == 4:
        numbers = numbers[0]
    numbers = numbers[tuple(slice(n) for n in shape[2:])].clone()
    for axis, (size, edge) in enumerate(zip(shape[2:], patch[-len(shape[2:]):])):
        if size % edge:  # models complete the last patch with the first row or column, which therefore stays
            numbers.select(axis, 0).zero_()
    digits = torch.stack([numbers >> digit & 1 for digit in range(math.prod(grid).bit_length())])
    return torch.cat([noise, noise + 2 * change * digits[:, None]])


def read_numbers(q):
    """The patch number of each token, 0 where no item changes it: (tokens,)."""
    change = (q[1:] - q[:1]).norm(dim=-1)
    digits = change > change.amax(1, keepdim=True) / 4
    return (digits.long() << torch.arange(len(digits), device=q.device)[:, None]).sum(0).cpu()


def check(call, grid):
    """Tokens of the grid are where the layout says, others are no patches, and the order walks from neighbour to
    neighbour."""
    assert not isinstance(call.layout, str), call.layout
    assert call.layout.grid == grid and call.layout.tokens == call.q.shape[1]
    numbers = read_numbers(call.q)
    start, visual = call.layout.before, math.prod(grid)
    assert numbers[start:start + visual].tolist() == list(range(1, visual + 1))
    assert not numbers[:start].any() and not numbers[start + visual:].any()
    assert sorted(call.order.tolist()) == list(range(len(numbers)))
    cells = torch.unravel_index(numbers[call.order[:visual].long().cpu()] - 1, grid)
    steps = sum(cell.diff().abs() for cell in cells)
    assert steps.eq(1).all()
    assert not numbers[call.order[visual:].long().cpu()].any()


def check_all(calls, grid):
    """Calls over as many tokens have one layout; the first of them has its tokens mixed least."""
    first = {}
    for call in calls:
        assert call.layout == first.setdefault(call.q.shape[1], call).layout
    for call in first.values():
        check(call, grid)


@pytest.fixture(scope="module")
def load(comfy_nodes, tmp_path_factory):
    """load(name) -> ModelPatcher of a test family."""
    models = {}

    def load(name):
        if name not in models:
            path = tmp_path_factory.mktemp("checkpoints") / f"{name}.safetensors"
            checkpoints.write(FAMILIES[name], path)
            with pytest.MonkeyPatch.context() as monkeypatch:
                models[name] = checkpoints.load(FAMILIES[name], path, monkeypatch)
        return models[name]

    return load


def record(comfy_nodes, model, family, patch, extra=None, **kwargs):
    """Recorded calls of one model evaluation by ComfyUI's sampler; `extra`: further entries of the condition."""
    import comfy.sample

    patched = apply(comfy_nodes, model)
    recorder = Recorder(comfy_nodes)
    patched.model_options["transformer_options"][SLOT] = recorder
    noise = numbered(family.latent, patch)
    positive = kwargs.pop("positive", None) or condition(family)
    positive[0][1].update(extra or {})
    for samples in noise.split(len(noise) if family.batches else 1):
        latents = family.latents(samples)
        comfy.sample.sample(patched, latents, 1, 1.0, "euler", "simple", positive, positive, latents * 0, seed=0,
                            disable_pbar=True, **kwargs)
    return recorder.calls if family.batches else joined(recorder.calls, len(noise))


def joined(calls, runs):
    """The calls of so many runs with one sample each, as those of one run with a batch."""
    by_run = len(calls) // runs
    return [replace(calls[i], q=torch.cat([call.q for call in calls[i::by_run]])) for i in range(by_run)]


CASES = [(name, family.latent) for name, family in FAMILIES.items() if name != "sdxl"] + list(ODD.items())


@pytest.mark.parametrize("name, shape", CASES, ids=lambda value: value if isinstance(value, str) else str(value[2:]))
def test_grid_of_every_family(comfy_nodes, load, name, shape):
    family, patch = replace(FAMILIES[name], latent=shape), PATCHES.get(name, (1, 2, 2))
    calls = record(comfy_nodes, load(name), family, patch)
    assert len(calls) == family.calls
    check_all(calls, patch_grid(shape, patch))


REFERENCES = {
    "flux": {"reference_latents": [torch.zeros(1, 16, 20, 31), torch.zeros(1, 16, 16, 16)]},
    "flux2": {"reference_latents": [torch.zeros(1, 128, 10, 15)]},
    "qwen_image": {"reference_latents": [torch.zeros(1, 16, 1, 20, 31)]},
    "z_image": {"reference_latents": [torch.zeros(1, 16, 20, 32)]},
    "wan": {"time_dim_concat": torch.zeros(1, 16, 1, 32, 32), "context_latents": [torch.zeros(1, 16, 2, 17, 20)]},
    "hunyuan_video": {"ref_latent": torch.zeros(1, 16, 1, 32, 32)},
    "hunyuan_video_1.5": {"conditioning_byt5small": torch.zeros(1, 20, 1472),
                          "clip_vision_output": SimpleNamespace(last_hidden_state=torch.zeros(1, 49, 1152))},
    "wan_s2v": {"reference_latents": [torch.zeros(1, 16, 1, 32, 32)], "audio_embed": torch.ones(1, 25, 1024, 12),
                "reference_motion": torch.zeros(1, 16, 19, 32, 32)},
    # key frames: a picture, a clip with its sound; references: a picture, a clip with its sound, sound alone
    "minimax_h3": {
        "minimax_keyframes": [
            {"resolved_frame_index": 0, "latent": torch.zeros(1, 24, 1, 32, 32)},
            {"resolved_frame_index": 4, "latent": torch.zeros(1, 24, 2, 32, 32),
             "audio_latent": torch.zeros(1, 32, 2, 5)}],
        "minimax_refs": [
            {"kind": "image", "latent_h": 20, "latent_w": 30, "latent": torch.zeros(1, 24, 1, 20, 30)},
            {"kind": "video_audio", "latent_t": 2, "latent_h": 16, "latent_w": 18, "ref_audio_t": 7,
             "latent": torch.zeros(1, 24, 2, 16, 18), "audio_latent": torch.zeros(1, 32, 2, 7)},
            {"kind": "audio", "ref_audio_t": 3, "audio_latent": torch.zeros(1, 32, 2, 3)}]},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_are_no_part_of_the_grid(comfy_nodes, load, name):
    """Except for frames that continue the clip, as Wan's `time_dim_concat` does."""
    family = FAMILIES[name]
    if name == "hunyuan_video":  # takes a reference for one sample alone
        family = replace(family, batches=False)
    extra = copy.deepcopy(REFERENCES[name])  # ComfyUI scales the latents of a condition in place
    calls = record(comfy_nodes, load(name), family, PATCHES.get(name, (1, 2, 2)), extra)
    grid = patch_grid(family.latent, PATCHES.get(name, (1, 2, 2)))
    assert max(call.q.shape[1] for call in calls) > family.tokens
    for call in calls:
        if name == "wan":
            assert call.layout.grid == (4, 16, 16) and call.layout.after == 2 * 9 * 10
            call.layout = replace(call.layout, grid=grid, after=call.layout.tokens - math.prod(grid))
            call.order = call.layout.order("hilbert", call.q.device)
        if name == "minimax_h3":  # text, a picture | a clip | its sound, a picture, sound | a clip | sound, the video's
            assert call.layout.exact == ((0, 304), (816, 990), (1134, 1170))
    check_all(calls, grid)


@pytest.mark.parametrize("name", ("ltxv", "ltx2"))
def test_guides_follow_the_grid(comfy_nodes, load, name):
    """LTX appends the frames to follow to the latent, and tells their places in the clip."""
    family = replace(FAMILIES[name], latent=(1, 128, 4, 16, 18))
    guide = torch.cartesian_prod(torch.arange(1.0), torch.arange(16.0), torch.arange(18.0)).T * 32
    extra = {"keyframe_idxs": guide[None, ..., None].repeat(1, 1, 1, 2)}
    mask = torch.ones(1, 1, 4, 16, 18)
    mask[:, :, 3:] = 0
    calls = record(comfy_nodes, load(name), family, (1, 1, 1), extra, noise_mask=mask)
    assert calls[0].layout.after == 16 * 18
    check_all(calls, (3, 16, 18))


def test_batches_of_conditions_of_different_lengths(comfy_nodes, load):
    """Each evaluation has its own text, and its own layout."""
    for name, length in (("flux", 24), ("flux", 80), ("sd3.5", 24), ("mochi", 24)):
        family = FAMILIES[name]
        calls = record(comfy_nodes, load(name), family, (1, 2, 2), positive=condition(family, length))
        check_all(calls, patch_grid(family.latent, (1, 2, 2)))


def test_levels_of_a_unet(comfy_nodes, load):
    """Convolutions spread a change: the tokens that change most surround the pixels changed."""
    import comfy.sample

    family, model = FAMILIES["sdxl"], load("sdxl")
    patched = apply(comfy_nodes, model)
    recorder = Recorder(comfy_nodes)
    patched.model_options["transformer_options"][SLOT] = recorder
    noise = torch.randn(1, 4, 56, 40, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1, 1)
    pixels = [(8, 8), (8, 32), (48, 8), (24, 20)]
    for item, (y, x) in enumerate(pixels, 1):
        noise[item, :, y - 2:y + 2, x - 2:x + 2] *= -2
    positive = condition(family)
    comfy.sample.sample(patched, noise, 1, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), seed=0,
                        disable_pbar=True)
    call = recorder.calls[0]
    assert call.layout.grid == (1, 28, 20) and call.layout.tokens == 560
    weight = (call.q[1:] - call.q[:1]).norm(dim=-1).cpu()
    weight = (weight - weight.median(1, keepdim=True).values).clamp(min=0) ** 4
    y, x = torch.unravel_index(torch.arange(560), (28, 20))
    found = torch.stack([(weight * y).sum(1), (weight * x).sum(1)], 1) / weight.sum(1, keepdim=True)
    assert (found - (torch.tensor(pixels) / 2 - 0.5)).abs().max() < 1.5


@pytest.mark.parametrize("name", BARE)
def test_grid_of_bare_models(comfy_nodes, name):
    bare = BARE[name]
    recorder, latent = Recorder(comfy_nodes), numbered(bare.latent, bare.patch)
    batch = len(latent)
    text = torch.randn(1, bare.text, 64, generator=torch.Generator().manual_seed(1)).expand(batch, -1, -1)
    conds = {key: batched(value, batch) for key, value in (bare.conds or {}).items()}
    with torch.no_grad():
        comfy_host.pack_module(comfy_nodes, "nodes.call.model_rules").expect_tokens(
            Evaluation(bare.build()), latent, torch.full((batch,), 0.5), None, text, None, {SLOT: recorder}, **conds)
    assert recorder.calls
    check_all(recorder.calls, patch_grid(bare.latent, bare.patch))


def run_log(comfy_nodes, caplog, model, family, **widgets):
    """The latent of a run and the pack's log lines."""
    caplog.clear()
    with caplog.at_level("INFO"):
        latent = sample(apply(comfy_nodes, model, **widgets), family)
    return latent, "\n".join(record.getMessage() for record in caplog.records if "SpargeAttn" in record.getMessage())


@pytest.mark.parametrize("name", FAMILIES)
def test_order_is_numerically_neutral(comfy_nodes, load, caplog, name):
    """With thresholds that keep everything; and the summary names order and grid."""
    family, model = FAMILIES[name], load(name)
    everything = {"selection": "topk", "keep_percent": 100.0, "similarity_threshold": -1.0}
    off, log = run_log(comfy_nodes, caplog, model, family, selection=everything, hilbert="off")
    assert "in row-major order of" in log and "hilbert" not in log
    on, log = run_log(comfy_nodes, caplog, model, family, selection=everything, hilbert="on")
    assert "in hilbert order of" in log and "no hilbert order" not in log
    assert relative_l1(on, off) <= (1e-4 if not torch.cuda.is_available() else 0.1)


@pytest.mark.parametrize("name", ("wan", "flux"))
def test_order_decides_what_is_skipped(comfy_nodes, load, caplog, name):
    family, model = FAMILIES[name], load(name)
    off, _ = run_log(comfy_nodes, caplog, model, family, selection=SPARSE, hilbert="off")
    on, _ = run_log(comfy_nodes, caplog, model, family, selection=SPARSE, hilbert="on")
    assert not torch.equal(on, off)


@pytest.mark.parametrize("name, wrong", (("wan", (32, 4, 6)), ("flux", (1, 9, 64)), ("mochi", (3, 32, 8))))
def test_a_wrong_grid_costs_sparsity_alone(comfy_nodes, load, monkeypatch, name, wrong):
    """The thresholds still hold what they promise; only other blocks are alike."""
    family, model = FAMILIES[name], load(name)
    layout = comfy_host.pack_module(comfy_nodes, "nodes.call.token_layout").TokenLayout
    plan = comfy_host.pack_module(comfy_nodes, "nodes.call.plan")
    asked = []

    def token_layout(tokens, options):
        asked.append(tokens)
        return layout(wrong, before=0, after=tokens - math.prod(wrong))

    dense = sample(model, family)
    monkeypatch.setattr(plan, "token_layout", token_layout)
    wrongly_ordered = sample(apply(comfy_nodes, model, selection=CONSERVATIVE, hilbert="on"), family)
    assert asked
    assert relative_l1(wrongly_ordered, dense) <= (1e-4 if not torch.cuda.is_available() else 0.1)


def test_an_unknown_model_keeps_its_order_and_says_so_once(comfy_nodes, load, monkeypatch, caplog):
    rules = comfy_host.pack_module(comfy_nodes, "nodes.call.model_rules")
    monkeypatch.delitem(rules._RULES, "WanModel")
    _, log = run_log(comfy_nodes, caplog, load("wan"), FAMILIES["wan"], hilbert="on")
    assert log.count("no hilbert order: nothing is known about the token order of the model class WanModel") == 1
    assert "in hilbert order of" not in log
    _, log = run_log(comfy_nodes, caplog, load("wan"), FAMILIES["wan"], hilbert="off")
    assert "no hilbert order" not in log


def test_context_windows(comfy_nodes, load, caplog):
    """A clip that is sampled in windows has the windows' grid."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    family = replace(FAMILIES["wan"], latent=(1, 16, 5, 32, 32))
    windowed = WanContextWindowsManualNode.execute(
        model=load("wan"), context_length=9, context_overlap=4, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", freenoise=False).result[0]
    _, log = run_log(comfy_nodes, caplog, windowed, family, hilbert="on")
    assert "in hilbert order of 3×16×16" in log and "5×16×16" not in log and "no hilbert order" not in log

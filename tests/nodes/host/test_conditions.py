"""Masks, references and the like, as each model makes them of its conditions: its self-attention still goes sparse."""
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from sampling import apply, condition, probed, relative_l1, sample

SLOT = "optimized_attention_override"
STEPS = 2
# What always is attended, which in MiniMax-H3 is half of these tokens, comes on top.
FEW = {"selection": "topk", "keep_percent": 20.0, "similarity_threshold": -1.0}
BOUND = 0.02 if not torch.cuda.is_available() else 0.06


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding(length=48, of=30):
    """A prompt's mask, which ends in padding."""
    return {"attention_mask": (torch.arange(length) < of).long()[None]}


def first_frame(channels, frames, size):
    """A picture to start from: its latent, and a mask that is zero there."""
    mask = torch.ones(1, 1, frames, size, size)
    mask[:, :, 0] = 0
    return {"concat_latent_image": noise(1, channels, frames, size, size), "concat_mask": mask}


# family, what → further entries of the condition
CASES = {
    ("minimax_h3", "key frame, picture, clip with sound"): lambda: {
        "minimax_keyframes": [{"resolved_frame_index": 0, "latent": noise(1, 24, 1, 32, 32)}],
        "minimax_refs": [
            {"kind": "image", "latent_h": 20, "latent_w": 30, "latent": noise(1, 24, 1, 20, 30)},
            {"kind": "video_audio", "latent_t": 2, "latent_h": 16, "latent_w": 18, "ref_audio_t": 7,
             "latent": noise(1, 24, 2, 16, 18), "audio_latent": noise(1, 32, 2, 7)}]},
    ("wan_image", "picture and mask"): lambda: first_frame(16, 3, 32),
    ("wan_s2v", "sound, reference, earlier frames"): lambda: {
        "reference_latents": [noise(1, 16, 1, 32, 32)], "audio_embed": noise(1, 25, 1024, 12),
        "reference_motion": noise(1, 16, 19, 32, 32)},
    ("wan_animate", "poses, picture and mask"): lambda: {
        "pose_video_latent": noise(1, 16, 2, 32, 32, seed=1), **first_frame(16, 3, 32)},
    ("ltx2", "a voice to follow"): lambda: {"ref_audio": {"tokens": noise(1, 40, 128)}},
    ("hunyuan_video", "padded prompt"): padding,
    ("hunyuan_video", "reference"): lambda: {"ref_latent": noise(1, 16, 1, 32, 32)},
    ("hunyuan_video", "guiding frame"): lambda: {"guiding_frame_index": 0},
    ("hunyuan_video_1.5", "padded prompt"): padding,
    # The host can't add a prompt's padding to these.
    ("hunyuan_video_1.5", "glyphs, picture and mask"): lambda: {
        "conditioning_byt5small": noise(1, 20, 1472), **first_frame(32, 3, 16),
        "clip_vision_output": SimpleNamespace(last_hidden_state=noise(1, 49, 1152, seed=1))},
    ("qwen_image", "padded prompt"): padding,
    ("qwen_image", "references, padded prompt"): lambda: {
        "reference_latents": [noise(1, 16, 1, 20, 31), noise(1, 16, 1, 16, 16)], **padding()},
    ("flux2", "references"): lambda: {"reference_latents": [noise(1, 128, 10, 15), noise(1, 128, 8, 8)]},
    ("z_image", "reference"): lambda: {"reference_latents": [noise(1, 16, 20, 32)]},
    ("kandinsky5", "first frame"): lambda: {"time_dim_replace": noise(1, 16, 1, 32, 32)},
    ("cosmos_image", "picture and mask"): lambda: first_frame(16, 3, 32),
    ("cosmos_predict2_image", "picture and mask"): lambda: first_frame(16, 3, 32),
}


@pytest.fixture(scope="module")
def load(comfy_nodes, tmp_path_factory):
    """load(name) → (family, its ModelPatcher)."""
    models = {}

    def load(name):
        if name not in models:
            with pytest.MonkeyPatch.context() as patch:
                models[name] = checkpoints.written(checkpoints.FAMILIES[name], tmp_path_factory.mktemp(name), patch)
        return checkpoints.FAMILIES[name], models[name]

    return load


@pytest.mark.parametrize("name, what", CASES, ids=lambda value: value.replace(" ", "_"))
def test_self_attention_goes_sparse(comfy_nodes, load, name, what):
    family, model = load(name)

    def run(patched, extra=None):
        positive = condition(family)
        positive[0][1].update(extra or {})
        return sample(patched, family, steps=STEPS, positive=positive)

    extra = CASES[name, what]
    dense, without = run(model, extra()), run(model)
    below, probe = probed(model)  # what ours declines reaches it
    every = run(apply(comfy_nodes, below), extra())
    assert probe.declined == [] and relative_l1(every, dense) <= BOUND
    assert relative_l1(dense, without) > 10 * relative_l1(every, dense), "the condition makes no difference"

    sparse = apply(comfy_nodes, model, selection=FEW)
    # Random weights spread the softmax evenly, so that its error stays small.
    assert 1e-3 < relative_l1(run(sparse, extra()), dense) < 0.5
    summary = sparse.model_options["transformer_options"][SLOT].run.summary
    assert summary.sparse == STEPS * family.calls and summary.sparsity > 0.1, summary

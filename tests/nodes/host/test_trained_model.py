"""The demo's trained video model in ComfyUI: attention with structure, where skipping blocks does little harm."""
import re

import comfy_host
import pytest
import torch
from sampling import apply, relative_l1

CHECKPOINT = comfy_host.REPOSITORY / "nodes/demo/wan_shapes.safetensors"
GRID = 4, 16, 24  # tokens: 1536
STEPS = 4


@pytest.fixture(scope="module")
def prompts(comfy_nodes):
    from comfyui_spargeattn.nodes.demo.words import prompt

    return prompt("star red stripes right", "blue checker left")[None]


@pytest.fixture(scope="module")
def sample(comfy_nodes, prompts):
    """Model-space latent (1, 16, T, H, W) of the prompt from a ModelPatcher, by ComfyUI's sampler."""
    import comfy.sample

    from comfyui_spargeattn.nodes.demo.words import encode

    shape = (1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    condition = [[encode(prompts), {}]]

    def run(model, steps=STEPS):
        latent = comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", condition, condition,
                                     torch.zeros(shape), seed=0, disable_pbar=True)
        return model.model.process_latent_in(latent)

    return run


@pytest.fixture(scope="module")
def model(comfy_nodes):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(CHECKPOINT))


@pytest.fixture(scope="module")
def dense(model, sample):
    return sample(model)


def psnr(demo, clip, dense):
    """Decibels between the previews of two clips."""
    return -10 * torch.log10((demo.clips.preview(clip) - demo.clips.preview(dense)).square().mean()).item()


def test_comfyui_and_the_demo_make_the_same_clip(demo, prompts, dense):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = demo.model.load(CHECKPOINT, device)
    latent = demo.sampling.sample(plain, prompts, (GRID[0], 2 * GRID[1], 2 * GRID[2]), STEPS).cpu()
    # ComfyUI's schedule is a table of 1000 levels; on a GPU it also runs the 16-bit weights in 16 bit.
    assert relative_l1(dense, latent) < 0.02


# On a GPU the products are quantised too.
@pytest.mark.parametrize("similarity, least_sparsity, least_psnr",
                         ((0.6, 0.0, 40 if torch.cuda.is_available() else 60), (-1.0, 0.1, 35)))
def test_sparse_clip_is_close_to_dense(comfy_nodes, demo, model, sample, dense, caplog, similarity, least_sparsity,
                                       least_psnr):
    """The defaults, and the defaults without the similarity judge, which on its own keeps nearly all at this size."""
    selection = {"selection": "cdf", "cdf_threshold": 0.98, "similarity_threshold": similarity}
    with caplog.at_level("INFO"):
        sparse = sample(apply(comfy_nodes, model, selection=selection))
    calls, sparsity = re.search(r"(\d+) attention calls sparse \(mean sparsity ([\d.]+)%", caplog.text).groups()
    assert int(calls) == STEPS * 6
    assert float(sparsity) / 100 >= least_sparsity
    assert psnr(demo, sparse, dense) > least_psnr


@pytest.mark.usefixtures("short_runs_refresh")
def test_residuals_bring_a_clip_closer_to_dense(comfy_nodes, demo, model, sample, monkeypatch):
    """Two refreshes in eight steps, against the same dense steps without a residual and against no refresh. Where no
    residual is kept, calls keep more, and so come closer still."""
    steps = 8
    dense = sample(model, steps)
    selection = {"selection": "topk", "keep_percent": 25.0, "similarity_threshold": -1.0}
    plain = apply(comfy_nodes, model, selection=selection, start_percent=0.2)
    with_residual, without = (apply(comfy_nodes, model, selection=selection, start_percent=0.2, refreshes=2)
                              for _ in range(2))
    run = without.model_options["transformer_options"]["optimized_attention_override"].run
    run.residuals.admits = lambda *args: False
    careful = psnr(demo, sample(without, steps), dense)
    plans = comfy_host.pack_module(comfy_nodes, "nodes.call.plan")
    monkeypatch.setattr(plans.SparsePlan, "keeping", lambda plan, least: plan)
    found = [psnr(demo, sample(patched, steps), dense) for patched in (plain, without, with_residual)]
    assert found[2] > found[1] + 5 > found[0] + 5 and careful > found[1] + 5, (found, careful)

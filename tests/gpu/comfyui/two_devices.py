"""The trained demo model with guidance on one GPU and on two, its conditions split by ComfyUI's MultiGPU CFG Split.

    python tests/gpu/comfyui/two_devices.py --comfyui PATH [--out FILE]

Prints one JSON object: for dense attention, Apply SpargeAttn, the same with refreshes and with tuned parameters, the
seconds of a run on one GPU and on two, how far apart their clips are, and what went sparse. Without GPUs the CPU serves
as both devices, at a size for it.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import in_comfyui

CHECKPOINT = in_comfyui.TESTS.parent / "nodes/demo/wan_shapes.safetensors"
POSITIVE, NEGATIVE = ("star red stripes right", "blue checker left"), ("ring yellow plain left", "green plain up")
TOPK = {"selection": "topk", "keep_percent": 30.0, "similarity_threshold": -1.0}


def conditions():
    from comfyui_spargeattn.nodes.demo.words import encode, prompt

    return [[[encode(prompt(*words)[None]), {}]] for words in (POSITIVE, NEGATIVE)]


def sample(model, shape, steps):
    """The latent, on the CPU, and the seconds that it took."""
    import comfy.sample
    import torch

    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    latent = comfy.sample.sample(model, noise, steps, 4.0, "euler", "simple", *conditions(), torch.zeros(shape), seed=0,
                                 disable_pbar=True)
    return latent, time.perf_counter() - start


def split(model):
    import comfy.multigpu

    return comfy.multigpu.create_multigpu_deepclones(model, 2)


def tune(nodes, model, shape, steps):
    """Parameters that were searched on both devices."""
    import torch
    from sampling import widget_defaults

    tuner = nodes.NODE_CLASS_MAPPINGS["SpargeAttnTune"]
    positive, negative = conditions()
    values = {**widget_defaults(tuner), "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
              "sampled_steps": 1, "start_percent": 0.0, "min_tokens": 512, "evaluate": False}
    return tuner.execute(model=split(model), positive=positive, negative=negative,
                         latent_image={"samples": torch.zeros(shape)}, **values).result[0]


def compare(patched, shape, steps):
    """One run on one device and one on two, each after a run that compiles and warms up."""
    override = patched.model_options["transformer_options"].get("optimized_attention_override")
    facts, latents = {}, []
    for name, model in (("one", patched), ("two", split(patched))):
        sample(model, shape, 2)
        latent, seconds = sample(model, shape, steps)
        latents.append(latent)
        summary = override and override.run.summary
        facts[name] = {"seconds": round(seconds, 3), "summary": str(summary) if summary else "dense",
                       "sparse": summary.sparse if summary else 0}
    one, two = latents
    error = (one - two).square().mean().item()
    facts["psnr_db"] = 10 * math.log10((one.amax() - one.amin()).item() ** 2 / error) if error else math.inf
    facts["equal"] = bool((one == two).all())
    facts["speedup"] = round(facts["one"]["seconds"] / facts["two"]["seconds"], 3)
    return facts


def measure(comfyui, grid, steps):
    nodes, log = in_comfyui.start(comfyui)
    import comfy.model_management
    import comfy.sd
    import torch
    from sampling import apply

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices:
        both = [torch.device("cpu"), torch.device("cpu:0")]  # two names for it
        comfy.model_management.get_all_torch_devices = lambda exclude_current=False: both
    elif len(devices) < 2:
        sys.exit("this needs two GPUs")
    shape = (1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    model = comfy.sd.load_diffusion_model(str(CHECKPOINT))
    params = tune(nodes, model, shape, 4)
    settings = {"sparse": {"selection": TOPK}, "sparse with refreshes": {"selection": TOPK, "refreshes": 3},
                "tuned": {"params": params}}
    runs = {"dense": compare(model, shape, steps)}
    for name, widgets in settings.items():
        runs[name] = compare(apply(nodes, model, **widgets), shape, steps)
    return {"devices": devices or ["cpu"] * 2, "tokens": math.prod(grid), "steps": steps, "runs": runs,
            "layers_tuned": len(params.layers), "log": log.lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--grid", type=int, nargs=3, metavar=("T", "H", "W"), help="in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    import torch

    grid = options.grid or ((21, 30, 52) if torch.cuda.is_available() else (4, 8, 16))
    text = json.dumps(measure(options.comfyui, tuple(grid), options.steps), indent=1)
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

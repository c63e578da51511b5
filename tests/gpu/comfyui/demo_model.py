"""The trained demo model through ComfyUI's loader and sampler, dense and with Apply SpargeAttn.

    python tests/gpu/comfyui/demo_model.py --comfyui PATH [--out FILE]

Prints one JSON object: PSNR of the clip against dense, calls by path, host synchronisations, seconds.
"""
import argparse
import json
import math
import time
import warnings
from pathlib import Path

import in_comfyui

CHECKPOINT = in_comfyui.TESTS.parent / "nodes/demo/wan_shapes.safetensors"
PROMPT = "star red stripes right", "blue checker left"


class Synchronisations:
    """Counts waits of the host for the GPU, as CUDA's debug mode reports them; `inside`, and at which lines, only while
    the model runs."""

    def __init__(self):
        self.inside = self.total = 0
        self.lines = set()

    def __enter__(self):
        import torch

        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def _seen(self):
        return [f"{entry.filename}:{entry.lineno}" for entry in self._caught if "synchroniz" in str(entry.message)]

    def model_wrapper(self, executor, *args, **kwargs):
        before = len(self._seen())
        try:
            return executor(*args, **kwargs)
        finally:
            new = self._seen()[before:]
            self.inside += len(new)
            self.lines.update(new)

    def __exit__(self, *error):
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self.total = len(self._seen())
        self._catch.__exit__(*error)


def sample(model, grid, steps):
    """Model-space latent (16, T, H, W) of the demo's prompt, without guidance, and how the run went."""
    import comfy.sample
    import torch
    from comfy.patcher_extension import WrappersMP

    from comfyui_spargeattn.nodes.demo.words import encode, prompt

    condition = [[encode(prompt(*PROMPT)[None]), {}]]
    frames, height, width = grid
    shape = (1, 16, frames, 2 * height, 2 * width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    counted = model.clone()
    with Synchronisations() as synchronisations:
        counted.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "synchronisations", synchronisations.model_wrapper)
        start = time.perf_counter()
        latent = comfy.sample.sample(counted, noise, steps, 1.0, "euler", "simple", condition, condition,
                                     torch.zeros(shape), seed=0, disable_pbar=True)
        seconds = time.perf_counter() - start  # the latent is on the CPU: everything has finished
    facts = {"seconds": round(seconds, 3), "synchronisations": synchronisations.total,
             "synchronisations_in_the_model": synchronisations.inside, "lines": sorted(synchronisations.lines)}
    return model.model.process_latent_in(latent)[0], facts


def measure(comfyui, checkpoint, grid, steps, widgets):
    """Dense and patched runs of one seed, each after a run that compiles and warms up."""
    nodes, log = in_comfyui.start(comfyui)
    import comfy.sd
    import torch
    from demo.clips import preview
    from sampling import apply, probed

    model = comfy.sd.load_diffusion_model(str(checkpoint))
    below, probe = probed(model)
    patched = apply(nodes, below, **widgets)
    facts = {}
    sample(model, grid, 2)
    dense, facts["dense"] = sample(model, grid, steps)
    sample(patched, grid, 2)
    probe.calls.clear()
    log.lines.clear()
    sparse, facts["sparse"] = sample(patched, grid, steps)
    again, _ = sample(model, grid, steps)

    error = (preview(sparse) - preview(dense)).square().mean().item()
    calls = steps * len(model.model.diffusion_model.blocks)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(model.model.get_dtype_inference()), "tokens": math.prod(grid), "steps": steps,
        "widgets": widgets, "psnr_db": -10 * math.log10(error) if error else math.inf,
        "self_attention_calls": calls, "stayed_dense": len(probe.declined),
        "dense_before_and_after_equal": torch.equal(dense, again), "finite": bool(sparse.isfinite().all()),
        "log": log.lines, **facts,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), metavar=("T", "H", "W"), help="in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep-percent", type=float, help="fixed share of blocks instead of the default thresholds")
    parser.add_argument("--start-percent", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    widgets = {"start_percent": options.start_percent}
    if options.keep_percent is not None:
        widgets["selection"] = {"selection": "topk", "keep_percent": options.keep_percent,
                                "similarity_threshold": -1.0}
    text = json.dumps(measure(options.comfyui, options.checkpoint, tuple(options.grid), options.steps, widgets),
                      indent=1)
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

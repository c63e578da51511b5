"""Time of a sampling step of full-size architectures in ComfyUI, dense and with Apply SpargeAttn.

    python tests/gpu/comfyui/step_time.py --comfyui PATH --out FILE [--only MODEL] [--cfg SCALE]
        [--rows NAME …] [--tiny]

The weights are random, so the pictures mean nothing and only time and memory are measured: models are built by
ComfyUI's loader from random state dicts, sampled by its euler sampler, and compared with ComfyUI's default attention.
The node keeps a fixed share of the blocks (topk, the similarity judge off), which makes its time independent of the
weights. Its presets are measured over whole runs of 20 steps; what they skip by `cdf` depends on the weights, and of
random ones they skip little. cuDNN joins on a GPU, FlashAttention-3 where fa3-fwd is installed, and comfy-kitchen's
INT8 attention and its sparse one, where it takes the calls, where its CUDA extension is. Beside the time of a step
stands that of its kernels alone, because the GPU waits for the host in the rest; each row is compared with dense steps
that take turns with it, because a host that others use changes its pace within seconds. Guidance (`--cfg`) evaluates
both conditions together, as a batch of two. Mochi and MiniMax-H3 have their full width and length but fewer layers, so
that they fit beside their activations: only the share of attention in a step carries over. `--tiny` runs the same code
at a size for a CPU.
"""
import argparse
import json
import statistics
import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import in_comfyui

KEEP_PERCENT = 50.0, 20.0
MOCHI_LAYERS = 12  # of 48
MINIMAX_LAYERS, MINIMAX_LONG_LAYERS = 4, 2  # of 50
STEPS = 6  # of a run whose steps are alike
TURNS_MS = 2000  # how long dense runs take turns with such runs, at least
PRESET_STEPS = 20


def full_size():
    """Wan 2.1 1.3B at 480p, 81 frames, Flux.1 dev, SD3.5 large and SDXL at 1024x1024, Mochi at 480p, 163 frames, and
    MiniMax-H3 at 768p, 124 and 345 frames, as test families."""
    from checkpoints import Family

    def wan():
        from comfy.ldm.wan.model import WanModel

        return WanModel(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **on_meta())

    def flux():
        from comfy.ldm.flux.model import Flux

        return Flux(in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
                    mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000,
                    patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **on_meta())

    def sd35():
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

        return OpenAISignatureMMDITWrapper(
            input_size=None, in_channels=16, out_channels=16, depth=38, adm_in_channels=2048, num_patches=192 * 192,
            pos_embed_max_size=192, qk_norm="rms", pos_embed_scaling_factor=None, context_embedder_config={
                "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}}, **on_meta())

    def sdxl():
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        return UNetModel(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2],
                         channel_mult=(1, 2, 4), num_heads=-1, num_head_channels=64, use_spatial_transformer=True,
                         transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
                         transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048,
                         num_classes="sequential", adm_in_channels=2816, use_linear_in_transformer=True, legacy=False,
                         **on_meta())

    def mochi():
        from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

        return AsymmDiTJoint(depth=MOCHI_LAYERS, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536,
                             mlp_ratio_x=4.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True,
                             qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True,
                             posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False,
                             timestep_scale=1000.0, use_t5=True, t5_feat_dim=4096, t5_token_length=256,
                             rope_theta=10000.0, **on_meta())

    def minimax_h3(layers):
        from comfy.ldm.minimax.model import MiniMaxH3Model

        return MiniMaxH3Model(num_layers=layers, **on_meta())

    return {"wan": Family("Wan 2.1 1.3B 480p 81 frames", wan, (1, 16, 21, 60, 104), 32760, 30, (512, 4096)),
            "flux": Family("Flux.1 dev 1024x1024", flux, (1, 16, 128, 128), 4608, 57, (512, 4096), pooled=768),
            "sd3.5": Family("SD3.5 large 1024x1024", sd35, (1, 16, 128, 128), 154 + 4096, 38, (154, 4096), pooled=2048),
            "sdxl": Family("SDXL 1024x1024", sdxl, (1, 4, 128, 128), 4096, 10, (77, 2048), pooled=1280),
            "mochi": Family(f"Mochi 480p 163 frames, {MOCHI_LAYERS} of 48 layers", mochi, (1, 12, 28, 60, 106),
                            44520 + 256, MOCHI_LAYERS, (256, 4096), text_mask=True, detected={"depth": MOCHI_LAYERS}),
            "minimax_h3": Family(f"MiniMax-H3 768p 124 frames, {MINIMAX_LAYERS} of 50 layers",
                                 partial(minimax_h3, MINIMAX_LAYERS), (1, 24, 37, 48, 84), 256 + 2 * 207 + 37296,
                                 MINIMAX_LAYERS, (256, 5120), audio=(1, 32, 2, 207), batches=False),
            "minimax_h3_long": Family(f"MiniMax-H3 768p 345 frames, {MINIMAX_LONG_LAYERS} of 50 layers",
                                      partial(minimax_h3, MINIMAX_LONG_LAYERS), (1, 24, 102, 48, 84),
                                      256 + 2 * 575 + 102816, MINIMAX_LONG_LAYERS, (256, 5120),
                                      audio=(1, 32, 2, 575), batches=False)}


def on_meta():
    import comfy.ops
    import torch

    return {"operations": comfy.ops.disable_weight_init, "dtype": torch.bfloat16, "device": "meta"}


class Clock:
    """Marks in the GPU's stream, or in time on a CPU; intervals are read after a run, without disturbing it."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def mark(self):
        import torch

        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end):
        if not self.cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)


def timed_attention(model, clock):
    """A clone of `model` with marks around each attention call; returns it and the list of (start, end)."""
    clone, marks = model.clone(), []
    options = clone.model_options["transformer_options"]
    inner = options.get("optimized_attention_override", lambda func, *args, **kwargs: func(*args, **kwargs))

    def override(func, *args, **kwargs):
        start = clock.mark()
        out = inner(func, *args, **kwargs)
        marks.append((start, clock.mark()))
        return out

    options["optimized_attention_override"] = override
    return clone, marks


@contextmanager
def kernels_traced(clock):
    """Inside, kernels are traced; the list that it gives has their milliseconds afterwards, without the time between
    them. Empty on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    total = []
    if not clock.cuda:
        yield total
        return
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        yield total
    total.append(sum(entry.self_device_time_total for entry in traced.key_averages()) / 1000)


def measure(model, dense, family, clock, cfg, steps=STEPS, average=statistics.median):
    """Of `model` the average over the steps of runs: ms of a step, in another run ms of its attention and of all its
    kernels; peak memory in GiB. dense: the same model, which takes turns with it and leaves `dense_ms`."""
    import torch
    from sampling import sample

    def run(patcher, steps=steps):
        marks = [clock.mark()]
        out = sample(patcher, family, steps=steps, cfg=cfg, callback=lambda *_: marks.append(clock.mark()))
        return [clock.milliseconds(*pair) for pair in pairwise(marks)], bool(out.isfinite().all())

    run(model, steps=2 if steps == STEPS else steps)  # compiles all kinds of calls and warms up
    intervals, beside, finite, peak = [], [], True, None
    while sum(beside) < TURNS_MS and (not beside or steps == STEPS):
        beside += run(dense, STEPS)[0]
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        found, whole = run(model)
        intervals, finite = intervals + found, finite and whole
        peak = torch.cuda.max_memory_allocated() / 2**30 if clock.cuda else None
    timed, marks = timed_attention(model, clock)
    with kernels_traced(clock) as kernels:
        run(timed)
    calls = [clock.milliseconds(*pair) for pair in marks]
    per_step = len(calls) // steps
    attention = [sum(calls[i * per_step:(i + 1) * per_step]) for i in range(steps)]
    return {"step_ms": average(intervals), "dense_ms": statistics.median(beside), "steps_ms": intervals,
            "attention_ms": average(attention), "kernels_ms": kernels[0] / steps if kernels else None,
            "attention_calls": per_step, "peak_gib": peak, "finite": finite}


def load(family, device):
    """The family's architecture with random weights, through ComfyUI's loader."""
    import comfy.model_detection
    import comfy.sd
    import torch
    from checkpoints import random_weights

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    state = random_weights(family.build(), 0, dtype, device)
    metadata = {"config": json.dumps({"transformer": family.metadata})} if family.metadata else None
    detect = comfy.model_detection.detect_unet_config
    with mock.patch.object(comfy.model_detection, "detect_unet_config",
                           lambda *args, **kwargs: {**detect(*args, **kwargs), **family.detected}):
        return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype}, metadata=metadata)


def with_int8_attention(model):
    """A clone of `model` on comfy-kitchen's INT8 attention; None where its CUDA extension can't run."""
    from comfy.ldm.modules import attention

    if not getattr(attention, "COMFY_KITCHEN_INT8_ATTENTION_IS_AVAILABLE", False):
        return None
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        lambda func, *args, **kwargs: attention.attention_comfy_kitchen_int8(*args, **kwargs))
    return clone


def with_attention(model, attention, head_dims=None):
    """A clone of `model` whose unmasked self-attention of these head dims, or of all, is a function of (B, L, H, D)."""
    def override(func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **others):
        head_dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        if mask is not None or skip_output_reshape or q.shape != k.shape or head_dim not in (head_dims or [head_dim]):
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
                        **others)
        q, k, v = (x.transpose(1, 2) if skip_reshape else x.reshape(*x.shape[:2], heads, head_dim) for x in (q, k, v))
        return attention(q, k, v).flatten(2)

    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return clone


def cudnn_attention(q, k, v):
    """PyTorch's attention by cuDNN; ComfyUI's default prefers its FlashAttention-2."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def peers_on(model, device):
    """Name and clone of `model` for every other attention that can run here."""
    if device.type == "cuda":
        yield "cuDNN", with_attention(model, cudnn_attention)
    with suppress(ImportError, OSError):
        from fa3_fwd_interface import flash_attn_func

        yield "FlashAttention-3", with_attention(model, flash_attn_func)
    int8 = with_int8_attention(model)
    if int8 is not None:
        yield "comfy-kitchen int8", int8
    with suppress(ImportError, OSError):
        from comfy_kitchen import sol_attn, sol_attn_is_available

        if sol_attn_is_available():
            yield "sol_attn τ=1.3", with_attention(model, partial(sol_attn, tau=1.3, token_aug=256), [128])


def compare(nodes, log, family, device, min_tokens, cfg, wanted):
    """Yields a row for dense attention, one for each peer, share of kept blocks and preset, if their names are wanted.
    """
    from comfy_host import pack_module
    from sampling import apply as apply_node

    apply = partial(apply_node, min_tokens=min_tokens)
    model, clock = load(family, device), Clock(device)
    timed = partial(measure, dense=model, family=family, clock=clock, cfg=cfg)

    def row(attention, measured, **others):
        return {"model": family.name, "cfg": cfg, "tokens": family.tokens, "attention": attention, **others, **measured,
                "speedup": measured["dense_ms"] / measured["step_ms"],
                "attention_share": measured["attention_ms"] / measured["step_ms"]}

    if wanted("dense"):
        yield row("dense", timed(model))
    for name, peer in peers_on(model, device):
        if wanted(name):
            yield row(name, timed(peer))
    for percent in KEEP_PERCENT:
        name = f"keep {percent:g}%"
        if not wanted(name):
            continue
        log.lines.clear()
        selection = {"selection": "topk", "keep_percent": percent, "similarity_threshold": -1.0}
        measured = timed(apply(nodes, model, selection=selection))
        sparse = about_sparse_calls(log)
        assert len(sparse) > 2 and all(f"{steps * family.calls} attention calls sparse" in line
                                       for steps, line in zip((2, *(STEPS,) * (len(sparse) - 1)), sparse)), log.lines
        yield row(name, measured, log=sparse[-1])
    for preset in filter(wanted, pack_module(nodes, "nodes.presets").PRESETS):
        log.lines.clear()
        measured = timed(apply(nodes, model, preset=preset), steps=PRESET_STEPS, average=statistics.fmean)
        yield row(f"{preset}, {PRESET_STEPS} steps", measured, log=about_sparse_calls(log)[-1])


def about_sparse_calls(log):
    """The lines that tell what runs were like."""
    return [line for line in log.lines if "attention calls sparse" in line]


def table(rows):
    lines = ["| model | CFG | tokens | attention | step ms | × | kernels ms | attention ms | its share | peak GiB |",
             "|" + "---|" * 10]
    for row in rows:
        kernels, peak = ("–" if row[name] is None else f"{row[name]:.1f}" for name in ("kernels_ms", "peak_gib"))
        lines.append(f"| {row['model']} | {row['cfg']:g} | {row['tokens']} | {row['attention']} | "
                     f"{row['step_ms']:.1f} | {row['speedup']:.2f} | {kernels} | {row['attention_ms']:.1f} | "
                     f"{row['attention_share']:.0%} | {peak} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--out", type=Path, required=True, help="file for the results as JSON")
    parser.add_argument("--only", choices=("wan", "flux", "sd3.5", "sdxl", "mochi", "minimax_h3", "minimax_h3_long"))
    parser.add_argument("--cfg", type=float, default=1.0, help="scale of classifier-free guidance; 1 for none")
    parser.add_argument("--rows", nargs="+", metavar="NAME",
                        help="'dense', 'keep 50%%', a preset, …, by how they begin; all by default")
    parser.add_argument("--tiny", action="store_true", help="models of the size of the tests")
    options = parser.parse_args()

    nodes, log = in_comfyui.start(options.comfyui, highvram=True)  # weights go straight to the GPU
    import comfy.ldm.modules.attention
    import comfy.model_management
    import comfyui_version
    import torch
    from checkpoints import FAMILIES, MIN_TOKENS
    from sampling import node_class, widget_defaults

    min_tokens = MIN_TOKENS if options.tiny else widget_defaults(node_class(nodes))["min_tokens"]

    def wanted(name):
        return options.rows is None or name.startswith(tuple(options.rows))

    device = comfy.model_management.get_torch_device()
    families = full_size()
    if options.tiny:
        families = {name: FAMILIES[name] for name in families if name in FAMILIES}
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "comfyui": comfyui_version.__version__,
        "default_attention": comfy.ldm.modules.attention.optimized_attention.__name__, "steps": STEPS, "rows": [],
    }
    for name, family in families.items():
        if options.only in (None, name):
            for row in compare(nodes, log, family, device, min_tokens, options.cfg, wanted):
                report["rows"].append(row)
                options.out.write_text(json.dumps(report, indent=1))  # what is measured stays if the next row fails
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
    print(table(report["rows"]))


if __name__ == "__main__":
    main()

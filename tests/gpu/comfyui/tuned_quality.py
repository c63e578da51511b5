"""Tuned parameters beside fixed settings: the demo model through Tune SpargeAttn and Apply SpargeAttn in ComfyUI.

    python tests/gpu/comfyui/tuned_quality.py --comfyui PATH --out FOLDER [--start-percent 0.2] [--bounds 0.03 0.05]
    python tests/gpu/comfyui/tuned_quality.py --comfyui PATH --out FOLDER --cost

Searches once for each bound on one prompt and seed; then samples prompts and seeds that the search has not seen, dense
and with each setting. Writes tuned_quality.json, which `tests.bench.plots` draws, and prints a table: PSNR of the
clip's preview against dense, sparsity, and the time of a call on the GPU. `--cost` searches a random Wan 1.3B at 480p,
81 frames, instead, for its time and memory alone.
"""
import argparse
import importlib
import json
import math
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import in_comfyui

CHECKPOINT = in_comfyui.TESTS.parent / "nodes/demo/wan_shapes.safetensors"
TUNED_ON = ("star red stripes right", "blue checker left", "ring yellow plain left")
# Objects, background, second object, seed: none of them in the search.
UNSEEN = ((("triangle cyan stripes spin", "orange plain up", "none none none none"), 11),
          (("ring green plain down", "purple checker right", "star white stripes left"), 12),
          (("square yellow checker up", "blue plain left", "triangle red plain right"), 13))
OFF, JUDGE = -1.0, 0.5
FIXED = {
    **{f"topk {x:g}": {"selection": "topk", "keep_percent": 100 * x, "similarity_threshold": OFF}
       for x in (0.5, 0.3, 0.1)},
    **{f"cdf {x:g}{name}": {"selection": "cdf", "cdf_threshold": x, "similarity_threshold": theta}
       for x in (0.98, 0.95, 0.9) for theta, name in ((OFF, ""), (JUDGE, f", θ {JUDGE:g}"))},
}
REPEATS = 20


class Pack:
    """Modules of the pack as ComfyUI loaded it, under whatever name."""

    def __init__(self, node):
        self.root = node.__module__.removesuffix(".nodes.apply_node")

    def __call__(self, name):
        return importlib.import_module(f"{self.root}.{name}")


def condition(words):
    from comfyui_spargeattn.nodes.demo.words import encode, prompt

    return [[encode(prompt(*words)[None]), {}]]


def latent_shape(grid):
    return 1, 16, grid[0], 2 * grid[1], 2 * grid[2]


def sample(model, grid, steps, words, seed):
    """Model-space latent (16, T, H, W) of a prompt, without guidance."""
    import comfy.sample
    import torch

    shape = latent_shape(grid)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    positive = condition(words)
    latent = comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", positive, positive, torch.zeros(shape),
                                 seed=seed, disable_pbar=True)
    return model.model.process_latent_in(latent)[0]


def tune(nodes, model, positive, shape, **widgets):
    """(params, report picture, facts) of one search by the node."""
    import torch
    from sampling import widget_defaults

    node = nodes.NODE_CLASS_MAPPINGS["SpargeAttnTune"]
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    values = {**widget_defaults(node), "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", **widgets}
    params, _, picture = node.execute(model=model, positive=positive, negative=positive,
                                      latent_image={"samples": torch.zeros(shape)}, **values).result
    facts = {"seconds": time.perf_counter() - start, "sparsity": params.sparsity, "l1_mean_max": params.error,
             "unseen_l1_mean_max": params.unseen_error, "text": str(params),
             "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}
    return params, picture, facts


def dense_peak(run):
    """Peak memory of a dense run in GiB, None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def recorded_calls(pack, model, grid, steps, words, seed):
    """q, k, v and layout of the self-attention calls of the middle step, by layer."""
    calling, layers, rules, layouts, blocks = (pack(f"nodes.call.{name}") for name in (
        "arguments", "layer_names", "model_rules", "token_layout", "transformer_blocks"))
    from comfy.patcher_extension import WrappersMP

    recorder, names, found, step = model.clone(), layers.LayerNames(), {}, [-1]
    from_here = steps // 2

    def override(func, *args, **kwargs):
        call = calling.AttentionCall.parse(args, kwargs)
        block, name = blocks.TransformerBlock.of(call.transformer_options), None
        if call.q_tokens == call.k_tokens:
            name = names.name(call.transformer_options, block)
        if name is not None and step[0] == from_here:
            where = layouts.token_layout(call.q_tokens, call.transformer_options)
            found[name] = (call.q.clone(), call.k.clone(), call.v.clone(), call.layout, where)
        return func(*args, **kwargs)

    def count(executor, *args, **kwargs):
        step[0] += 1
        return executor(*args, **kwargs)

    recorder.model_options["transformer_options"]["optimized_attention_override"] = override
    for wrapper in (count, rules.expect_tokens, names.count):
        recorder.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "recorder", wrapper)
    sample(recorder, grid, steps, words, seed)
    return found


def milliseconds(launch):
    """Median time on the GPU of what `launch` queues, replayed as a CUDA graph so that the host plays no part."""
    import torch

    with torch.inference_mode():
        if not torch.cuda.is_available():
            launch()
            start = time.perf_counter()
            launch()
            return 1000 * (time.perf_counter() - start)
        for _ in range(3):
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


def call_time(pack, calls, launch_of):
    """Mean ms of a call, all layers of a step in a row. launch_of: (layer, q, k, v, layout, tokens) to a launch."""
    launches = [launch_of(name, *call) for name, call in calls.items()]

    def run():
        for launch in launches:
            launch()

    return milliseconds(run) / len(launches)


def launches(pack):
    """(dense, fixed, tuned): what each attention of a layer is, for `call_time`."""
    from functools import partial

    import torch.nn.functional as F

    kernels, tuned_setting = pack("kernels"), pack("nodes.call.tuned_setting")

    def dense(name, q, k, v, layout, tokens):
        q, k, v = (x if layout == "BHND" else x.transpose(1, 2) for x in (q, k, v))
        return partial(F.scaled_dot_product_attention, q, k, v)

    def fixed(selection):
        amount = {"topk": selection["keep_percent"] / 100} if selection["selection"] == "topk" else \
            {"cdf_threshold": selection["cdf_threshold"]}
        params = kernels.SpargeParams(**amount, similarity_threshold=selection["similarity_threshold"])
        return lambda name, q, k, v, layout, tokens: partial(
            kernels.sparge_attention, q, k, v, params=params, layout=layout)

    def tuned(params):
        def launch(name, q, k, v, layout, tokens):
            setting = params.layers[name].search.setting
            if setting is None:
                return dense(name, q, k, v, layout, tokens)
            order = tuned_setting.order_of(setting.curves, tokens, q.device)
            return partial(kernels.sparge_attention, q, k, v, params=tuned_setting.params_on(setting, q.device),
                           layout=layout, order=order, sink_keys=() if order is None else tokens.others,
                           skipped=setting.skipped, pv_dtype=setting.pv_dtype)
        return launch

    return dense, fixed, tuned


def quality(nodes, model, options, references, **widgets):
    """PSNR of each unseen clip and their mean sparsity over the sparse steps."""
    from demo.clips import preview
    from sampling import apply

    patched = apply(nodes, model, start_percent=options.start_percent, **widgets)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    psnr, sparsity = [], []
    for (words, seed), dense in zip(UNSEEN[:options.seeds], references):
        error = (preview(sample(patched, options.grid, options.steps, words, seed)) - preview(dense)).square().mean()
        psnr.append(-10 * math.log10(error.item()) if error else math.inf)
        sparsity.append(override.run.summary.sparsity or 0.0)
    return {"psnr_db": statistics.fmean(psnr), "psnr_each": psnr, "sparsity": statistics.fmean(sparsity)}


def compare(nodes, options):
    import comfy.sd
    import torch

    pack = Pack(nodes.NODE_CLASS_MAPPINGS["ApplySpargeAttn"])
    model = comfy.sd.load_diffusion_model(str(CHECKPOINT))
    grid, steps = options.grid, options.steps
    sample(model, grid, 2, *UNSEEN[0])
    peak = dense_peak(lambda: sample(model, grid, 2, *UNSEEN[0]))
    references = [sample(model, grid, steps, *case) for case in UNSEEN[:options.seeds]]
    calls = recorded_calls(pack, model, grid, steps, *UNSEEN[0])
    dense, fixed, tuned = launches(pack)
    rows = [{"setting": "dense", "kind": "dense", "call_ms": call_time(pack, calls, dense)}]
    for name, selection in () if options.tuned_alone else FIXED.items():
        rows.append({"setting": name, "kind": "fixed", "call_ms": call_time(pack, calls, fixed(selection)),
                     **quality(nodes, model, options, references, selection=selection)})
    for l1 in options.bounds:
        params, picture, facts = tune(
            nodes, model, condition(TUNED_ON), latent_shape(grid), seed=1, steps=steps, l1=l1,
            l2=round(options.l2 * l1, 4), sampled_steps=options.sampled, start_percent=options.start_percent,
            min_tokens=512)
        facts["layers"] = {name: _settings(layer.search) for name, layer in params.layers.items()}
        rows.append({"setting": f"tuned l1 {l1:g}", "kind": "tuned", "call_ms": call_time(pack, calls, tuned(params)),
                     **quality(nodes, model, options, references, params=params), "search": facts})
        _save_picture(picture, options.out / f"tuned_l1_{l1:g}.png")
        print(f"searched with l1 {l1:g}: {facts['seconds']:.1f} s; {facts['text']}", flush=True)
    cuda = torch.cuda.is_available()
    return {"mode": "tuning", "card": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
            "triton": version("triton") if cuda else None, "grid": grid, "steps": steps,
            "start_percent": options.start_percent, "sampled_steps": options.sampled,
            "dense_peak_gib": peak, "rows": rows}


def _settings(search):
    if search.setting is None:
        return None
    import torch

    setting = search.setting
    values = {name: [round(x, 4) if math.isfinite(x) else None for x in torch.as_tensor(value).flatten().tolist()]
              for name, value in setting.params.items()}
    return {**values, "curves": setting.curves, "skipped": setting.skipped, "pv_dtype": setting.pv_dtype,
            "sparsity": search.sparsity.tolist(), "l1": search.error.tolist(), "unseen_l1": search.unseen.tolist()}


def cost(nodes, options):
    """Time and memory of a search on a full-size model with random weights, or a tiny one on a CPU."""
    import torch
    from checkpoints import FAMILIES
    from sampling import condition as text
    from sampling import sample as sample_family
    from step_time import full_size, load

    family = FAMILIES["wan"] if options.tiny else full_size()["wan"]
    device = torch.device("cpu" if options.tiny else "cuda")
    model = load(family, device)
    sample_family(model, family, steps=1)
    peak = dense_peak(lambda: sample_family(model, family, steps=2))
    _, _, facts = tune(nodes, model, text(family), family.latent, seed=1, steps=options.steps,
                       sampled_steps=options.sampled, start_percent=options.start_percent, min_tokens=512,
                       evaluate=False, l1=options.bounds[0], l2=round(options.l2 * options.bounds[0], 4))
    return {"model": family.name, "tokens": family.tokens, "steps": options.steps, "sampled_steps": options.sampled,
            "dense_peak_gib": peak, **facts}


def _save_picture(image, path):
    from PIL import Image

    pixels = (image[0] * 255).round().byte().contiguous().numpy()
    Image.fromarray(pixels).save(path)


def table(rows):
    lines = ["| attention | blocks skipped | call ms | PSNR dB | each |", "|---" * 5 + "|"]
    for row in rows:
        if row["kind"] == "dense":
            lines.append(f"| dense | 0% | {row['call_ms']:.3f} | ∞ | |")
            continue
        each = ", ".join(f"{x:.1f}" for x in row["psnr_each"])
        lines.append(f"| {row['setting']} | {row['sparsity']:.1%} | {row['call_ms']:.3f} | {row['psnr_db']:.1f} | "
                     f"{each} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), metavar=("T", "H", "W"), help="in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampled", type=int, default=3, help="steps to search")
    parser.add_argument("--seeds", type=int, default=len(UNSEEN), help="unseen clips")
    parser.add_argument("--start-percent", type=float, default=0.2)
    parser.add_argument("--bounds", type=float, nargs="+", default=(0.02, 0.03, 0.05, 0.08), help="l1 of the searches")
    parser.add_argument("--l2", type=float, default=1.0, help="l2 as a multiple of l1; 1 leaves the λ test off")
    parser.add_argument("--tuned-alone", action="store_true", help="without the fixed settings")
    parser.add_argument("--cost", action="store_true", help="time and memory of a search on a random Wan 1.3B")
    parser.add_argument("--tiny", action="store_true", help="with --cost: a model for a CPU")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    nodes, log = in_comfyui.start(options.comfyui, highvram=True)
    if options.cost:
        facts = cost(nodes, options)
        (options.out / "search_cost.json").write_text(json.dumps(facts, indent=1))
        print(json.dumps(facts, indent=1))
        return
    facts = compare(nodes, options)
    (options.out / "tuned_quality.json").write_text(json.dumps({**facts, "log": log.lines}, indent=1))
    print(table(facts["rows"]))


if __name__ == "__main__":
    main()

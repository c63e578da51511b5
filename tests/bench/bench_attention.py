"""Time and error of attention on structured inputs: `python -m tests.bench.bench_attention --out results.json`.

Every method of a case runs in one process on the same tensors. A method's time is printed only after its output passed
the gate: dense methods against float32 attention, sparse ones against exact attention over the very blocks that they
chose, both on a sample of query blocks, so that an error of a kernel can't hide behind the error of the map.
"""
from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from comfyui_spargeattn.kernels import BlockMap, SpargeParams, block_map, sparge_attention
from tests.cases import video_qkv

# Shapes of models' self-attention at usual sizes; text tokens follow the visual ones.
CASES = {
    "wan1.3b-480p": dict(grid=(21, 30, 52), heads=12, dim=128),
    "mochi-22k": dict(grid=(28, 30, 26), heads=24, dim=128, text=256),
    "flux-1024": dict(grid=(1, 64, 64), heads=24, dim=128, text=512),
    "sd35-1024": dict(grid=(1, 64, 64), heads=24, dim=64, text=154, batch=2),
    "hunyuan-55k": dict(grid=(33, 45, 37), heads=24, dim=128, text=256),
    "wan14b-720p": dict(grid=(21, 45, 80), heads=40, dim=128),
}
BASELINE = "SDPA cuDNN"
# Relative L1 that quantisation alone may cost, against exact arithmetic over the same blocks.
GATES = {"exact": 0.01, "fp16": 0.025, "fp8": 0.06}


@dataclass
class Method:
    """run(q, k, v) → output; gate: a key of GATES; params: the map's parameters, None for dense methods."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate: str
    params: SpargeParams | None = None


def methods() -> list[Method]:
    """Peers that can be imported, then this project at fixed shares of kept blocks and at its defaults."""
    found = [Method("SDPA flash", lambda *qkv: _sdpa(SDPBackend.FLASH_ATTENTION, *qkv), "exact"),
             Method(BASELINE, lambda *qkv: _sdpa(SDPBackend.CUDNN_ATTENTION, *qkv), "exact")]
    try:
        from comfy_kitchen import int8_attention, int8_attention_is_available
    except ImportError:
        pass
    else:
        if int8_attention_is_available():
            found.append(Method("comfy-kitchen int8", int8_attention, "fp8"))
    settings = [(f"topk {topk}", SpargeParams(topk=topk, similarity_threshold=-1.0)) for topk in (1.0, 0.5, 0.3, 0.1)]
    settings.append(("defaults", SpargeParams()))
    for label, params in settings:
        for pv_dtype in ("fp8", "fp16"):
            found.append(Method(f"ours {pv_dtype} {label}", _ours(params, pv_dtype), pv_dtype, params))
    return found


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _ours(params: SpargeParams, pv_dtype: str) -> Callable:
    return lambda q, k, v: sparge_attention(q, k, v, params=params, pv_dtype=pv_dtype, impl="triton")


def exact_sample(q: Tensor, k: Tensor, v: Tensor, chosen: BlockMap | None, start: int, rows: int) -> Tensor:
    """float32 attention of query rows [start, start + rows), over the chosen blocks where there are any."""
    scores = q[:, :, start:start + rows].float() @ k.float().mT * q.shape[-1] ** -0.5
    if chosen is not None:
        mask = chosen.mask()[:, :, start // chosen.block.q].repeat_interleave(chosen.block.k, -1)[..., :k.shape[2]]
        scores.masked_fill_(~mask[:, :, None], float("-inf"))
    return scores.softmax(-1) @ v.float()


def passes(method: Method, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[bool, float]:
    """Whether the output is as near to exact arithmetic as the method's number format allows, and its L1."""
    chosen = None
    if method.params is not None:
        chosen = block_map(q, k, params=method.params, pv_dtype=method.gate, impl="triton")
    rows = 64 if chosen is None else chosen.block.q
    worst = 0.0
    for start in (0, q.shape[2] // 2 // rows * rows, (q.shape[2] - 1) // rows * rows):
        sample = out[:, :, start:start + rows]
        worst = max(worst, error(sample, exact_sample(q, k, v, chosen, start, sample.shape[2]))["L1"])
    return worst <= GATES[method.gate], worst


def error(out: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative L1 (the paper's measure) and cosine similarity."""
    out, exact = out.float(), exact.float()
    return dict(L1=((out - exact).abs().sum() / exact.abs().sum()).item(),
                cos=F.cosine_similarity(out.flatten(), exact.flatten(), dim=0).item())


def median_ms(run: Callable, repeats: int) -> float:
    """Median time of a call by CUDA events, after warming up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def run_case(name: str, repeats: int) -> list[dict]:
    """One row a method: gate, time, error against dense attention, sparsity, ratio to the baseline."""
    q, k, v = video_qkv(**CASES[name])
    dense, rows = _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v), []
    for method in methods():
        out = method.run(q, k, v)
        passed, gate_error = passes(method, out, q, k, v)
        row = dict(case=name, method=method.name, passed=passed, gate_L1=gate_error, **error(out, dense))
        if method.params is not None:
            stats = sparge_attention(q, k, v, params=method.params, pv_dtype=method.gate, impl="triton",
                                     return_stats=True)[1]
            row["sparsity"] = stats.sparsity.mean().item()
        if passed:
            row["ms"] = median_ms(partial(method.run, q, k, v), repeats)
        rows.append(row)
    baseline = next(row["ms"] for row in rows if row["method"] == BASELINE)
    for row in rows:
        if row["passed"]:
            row["speedup"] = baseline / row["ms"]
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| case | method | ms | × {BASELINE} | L1 | cosine | sparsity |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        time = f"{row['ms']:.2f} | {row['speedup']:.2f}" if row["passed"] else f"failed: L1 {row['gate_L1']:.3f} | "
        sparsity = f"{row['sparsity']:.2f}" if "sparsity" in row else ""
        lines.append(f"| {row['case']} | {row['method']} | {time} | {row['L1']:.4f} | {row['cos']:.5f} | {sparsity} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", help="JSON file for the rows")
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        rows += run_case(case, args.repeats)
        torch.cuda.empty_cache()
    import triton
    report = dict(card=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, rows=rows)
    print(f"{report['card']}, torch {report['torch']}, Triton {report['triton']}\n\n{table(rows)}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()

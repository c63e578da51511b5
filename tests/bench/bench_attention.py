"""Time and error of attention on structured inputs: `python -m tests.bench.bench_attention --out results.json`.

Every method of a case runs in one process on the same tensors. A method's time is printed only after its output passed
the gate: dense methods against float32 attention, ours against exact attention over the very blocks that it chose,
so that an error of a kernel can't hide behind the error of the map. `--sweep`, `--breakdown` and `--host` are other
modes.
"""
from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import block_map, sparge_attention
from tests.bench.breakdown import breakdown
from tests.bench.error_sweep import best
from tests.bench.host import host
from tests.bench.measure import GATES, card, device_ms, error, gate_error, host_us
from tests.bench.peers import BASELINE, Method, cudnn, methods
from tests.bench.sweeps import SWEEPS
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
# Only where they are named, because they take long: MiniMax-H3 at 37740 and 104050 tokens, sound among the text.
LONG_CASES = {
    "minimax-h3-38k": dict(grid=(37, 24, 42), heads=56, dim=128, text=444),
    "minimax-h3-104k": dict(grid=(102, 24, 42), heads=56, dim=128, text=1234),
}
_HOST_BELOW = 8192  # tokens; longer calls fill the queue, and the host would wait for the device


def six_cases(cases: dict[str, dict], repeats: int, parts: list[str]) -> list[dict]:
    """One row for each case and method whose name has one of the parts; if a method raises an error, the error stands
    in its row."""
    rows = []
    chosen = [method for method in methods() if any(part in method.name for part in (BASELINE, *parts))]
    for name, shape in cases.items():
        q, k, v = video_qkv(**shape)
        dense, found = cudnn(q, k, v), []
        for method in chosen:
            row = dict(case=name, method=method.name)
            try:
                row |= measured(method, q, k, v, dense, repeats)
            except Exception as problem:  # a peer may raise anything
                row["error"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            found.append(row)
        baseline = next(row.get("ms") for row in found if row["method"] == BASELINE)
        for row in found:
            if baseline and "ms" in row:
                row["speedup"] = baseline / row["ms"]
        rows += found
        del q, k, v, dense
        torch.cuda.empty_cache()
    return rows


def measured(method: Method, q: Tensor, k: Tensor, v: Tensor, dense: Tensor, repeats: int) -> dict:
    """Gate and error against dense attention, and times if the gate is passed."""
    out, row = method.run(q, k, v), {}
    if method.gate is None:
        passed = bool(out.isfinite().all())
    else:
        chosen = None
        if method.params is not None:
            chosen = block_map(q, k, params=method.params, pv_dtype=method.gate, impl="triton")
        row["gate_L1"] = gate_error(out, q, k, v, chosen, method.skipped)
        passed = row["gate_L1"] <= GATES[method.gate]
    row |= dict(passed=passed, **error(out, dense))
    if method.params is not None:
        stats = sparge_attention(q, k, v, params=method.params, pv_dtype=method.gate, impl="triton",
                                 return_stats=True)[1]
        row["sparsity"] = stats.sparsity.mean().item()
    if passed:
        run = partial(method.run, q, k, v)
        row["ms"] = device_ms(run, repeats)
        if q.shape[2] < _HOST_BELOW:
            row["host_us"] = host_us(run)
    return row


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table with every column that occurs."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(_text(row.get(name)) for name in columns) + " |" for row in rows])


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name[:40]} {ms:.3f}" for name, ms in value.items())
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=[""], metavar="PART",
                        help=f"parts of the names of methods to measure, beside {BASELINE}")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=[*CASES, *LONG_CASES])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", choices=list(SWEEPS))
    mode.add_argument("--breakdown", action="store_true")
    mode.add_argument("--host", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    name = args.sweep or ("breakdown" if args.breakdown else "host" if args.host else "cases")
    run = SWEEPS | {"breakdown": breakdown, "host": host, "cases": partial(six_cases, parts=args.methods)}
    cases = CASES if args.sweep == "sparsity" else {case: (CASES | LONG_CASES)[case] for case in args.cases}
    report = card() | dict(mode=name, rows=run[name](cases, args.repeats))
    shown = best(report["rows"]) if name == "error" else report["rows"]
    print(f"{report['card']}, torch {report['torch']}, Triton {report['triton']}\n\n{table(shown)}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

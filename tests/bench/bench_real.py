"""Error against kept share on real attention: `python -m tests.bench.bench_real --out real.json`.

The attention calls of trained models (DINOv2 on photographs, SmolLM2 on a novel, the demo's video model at several
noise levels) and structured random ones are replayed with every selection, similarity threshold, tail and token order.
For each it records the mean kept share, and the relative L1 of every head of every call: median, 90th percentile,
worst. On a GPU the package's kernels run. Elsewhere the same is computed exactly, from the reference's maps. README.md
beside this file says how to get models and text; a source whose files are missing is left out.
"""
from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.demo.words import prompt
from tests.bench.bench_orders import orders
from tests.bench.replay import TAILS, Call, Errors, by_kernels, dense, exactly
from tests.cases import video_qkv
from tests.demo.clips import clips
from tests.demo.compare import step_at
from tests.demo.model import WEIGHTS, load

VIDEO = (21, 30, 52)
SHORTER = (9, 20, 36)  # of the demo on a CPU
SEEDS = (0, 1, 2)
SCENES = (("star red plain right", "blue checker left", "ring yellow plain left"),
          ("triangle cyan stripes spin", "orange plain up"),
          ("ring green plain orbit", "white dots down", "square white plain up"))
LEVELS = (0.95, 0.7, 0.3)  # noise, one for each scene
TAU = (0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Lines of settings: name → (field of the amount, amounts, θ). The last is the call of the authors' README.
LINES = {"θ off": ("cdf_threshold", TAU, -1.0), "θ .3": ("cdf_threshold", TAU, 0.3),
         "θ .5": ("cdf_threshold", TAU, 0.5), "topk": ("topk", SHARES, -1.0),
         "authors": ("cdf_threshold", (0.97,), -0.1)}
SETTINGS = [SpargeParams(**{field: amount}, similarity_threshold=theta)
            for field, amounts, theta in LINES.values() for amount in amounts]
BOUNDS = (0.05, 0.1)
_GATE_TOKENS = 2048


def photographs(side: int, device: str, dtype: torch.dtype) -> Iterator[list[Call]]:
    """The calls of DINOv2 on each photograph, `side` pixels wide."""
    from tests.bench import dinov2

    model, cells = dinov2.DinoV2(device, dtype), side // dinov2.PATCH
    for name in dinov2.PHOTOGRAPHS:
        calls: list[Call] = []

        def attention(q, k, v, calls=calls):
            calls.append(Call(q, k, v, grid=(1, cells, cells), before=1))
            return dense(calls[-1])

        model.features(dinov2.photograph(name, side).to(device, dtype), attention)
        yield calls


def text(path: Path, tokens: int, device: str, dtype: torch.dtype) -> Iterator[list[Call]]:
    """The calls of SmolLM2 on three stretches of a text."""
    from tests.bench import smollm2

    tokenizer, model, _ = smollm2.load(device, dtype)
    ids = smollm2.token_ids(tokenizer, path, "Persuasion", device)
    for i in SEEDS:
        calls: list[Call] = []
        smollm2.listen(model, ids[None, i * tokens:(i + 1) * tokens],
                       lambda q, k, v, calls=calls: calls.append(Call(q, k, v, causal=True, before=4)))
        yield calls


def demo(grid: tuple[int, int, int], device: str, dtype: torch.dtype) -> Iterator[list[Call]]:
    """The calls of the demo's model on a drawn clip of each scene, each at its noise level."""
    model = load(WEIGHTS, device, dtype)
    for seed, (scene, level) in enumerate(zip(SCENES, LEVELS, strict=True)):
        calls, words = [], prompt(*scene)

        def attention(q, k, v, calls=calls):
            calls.append(Call(q, k, v, grid=grid))
            return dense(calls[-1])

        clip = clips(words[None], (grid[0], 2 * grid[1], 2 * grid[2]), torch.Generator().manual_seed(seed))[0]
        step_at(model, attention, words, clip, level, seed)
        yield calls


def structured(heads: int, device: str, dtype: torch.dtype) -> Iterator[list[Call]]:
    """Structured random calls."""
    for seed in SEEDS:
        yield [Call(*video_qkv(VIDEO, heads, 128, device=device, dtype=dtype, seed=seed), grid=VIDEO)]


def gate(call: Call) -> None:
    """Raise AssertionError unless `exactly` finds what the reference does, on the first tokens of a call."""
    part = Call(*(x[:, :, :_GATE_TOKENS] for x in (call.q, call.k, call.v)), causal=call.causal, before=call.before)
    settings = [SpargeParams(cdf_threshold=0.9, similarity_threshold=-1.0), SpargeParams(cdf_threshold=0.95),
                SpargeParams(topk=0.3)]
    fast, slow = exactly(part, None, settings), by_kernels(part, None, settings, impl="reference")
    torch.testing.assert_close(fast.kept, slow.kept, rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.l1, slow.l1, rtol=1e-3, atol=1e-5)


def summary(found: list[Errors]) -> list[dict]:
    """One row for each line of settings and tail; lists have an entry for each amount."""
    kept = torch.stack([errors.kept for errors in found], -1).flatten(1)  # [S, heads · calls]
    l1 = torch.stack([errors.l1 for errors in found], -1).flatten(2)  # [S, 2, heads · calls]
    rows, start = [], 0
    for name, (field, amounts, _) in LINES.items():
        part = slice(start, start + len(amounts))
        start = part.stop
        for i, tail in enumerate(TAILS):
            x = l1[part, i]
            measured = dict(kept=kept[part].mean(1), l1_median=x.median(1).values, l1_p90=x.quantile(0.9, 1),
                            l1_worst=x.amax(1))
            row = dict(setting=name, tail=tail, field=field, amounts=amounts)
            row |= {key: [round(y, 4) for y in value.tolist()] for key, value in measured.items()}
            if tail == "pooled":
                row["pooled_over_drop"] = [_ratio(*pair) for pair in zip(x, l1[part, 0], strict=True)]
            rows.append(row)
    return rows


def _ratio(pooled: Tensor, dropped: Tensor) -> dict[str, float] | None:
    """How the errors of heads compare; None where no head loses more than a thousandth by dropping."""
    ratio = (pooled / dropped)[dropped > 1e-3]
    if not len(ratio):
        return None
    return dict(heads=len(ratio), worse=round((ratio > 1).float().mean().item(), 4),
                median=round(ratio.median().item(), 3), worst=round(ratio.max().item(), 3))


def least(row: dict, measure: str, bound: float) -> float | None:
    """The least kept share of a row within an L1, between two measured amounts; None where none is within."""
    points = sorted(zip(row["kept"], row[measure], strict=True), reverse=True)
    if points[0][1] > bound:
        return None
    for (more, better), (less, worse) in pairwise(points):
        if worse > bound:
            better = max(better, 1e-4)
            return more + (less - more) * math.log(bound / better) / math.log(worse / better)
    return points[-1][0]


def table(rows: list[dict]) -> str:
    """Least kept share in percent, with skipped blocks dropped / pooled, where the median or the worst head is within
    an L1."""
    columns = [(measure, bound) for bound in BOUNDS for measure in ("l1_median", "l1_worst")]
    lines = ["| source | order | setting | " + " | ".join(
        f"{measure[3:]} ≤ {bound:g}" for measure, bound in columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for row, pooled in zip(rows[::2], rows[1::2], strict=True):
        if len(row["amounts"]) == 1:
            continue
        cells = [[least(x, *column) for x in (row, pooled)] for column in columns]
        lines.append(f"| {row['source']} | {row['order']} | {row['setting']} | " + " | ".join(
            " / ".join("–" if x is None else f"{100 * x:.0f}" for x in cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="a plain text, or Rdata.rdb of R's janeaustenr, for SmolLM2")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, at a time")
    parser.add_argument("--only", nargs="+", help="sources to measure")
    parser.add_argument("--exact", action="store_true", help="on a GPU too, compute exactly from the reference's maps")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    grid = VIDEO if gpu else SHORTER
    # name → (tokens, calls of each input, of how many blocks of queries one is measured where it is done exactly)
    sources = {
        "DINOv2, 518²": (1370, photographs(518, device, dtype), 2),
        "DINOv2, 1036²": (5477, photographs(1036, device, dtype), 8),
        "SmolLM2": (args.tokens, text(args.text, args.tokens, device, dtype), 8),
        "demo model": (math.prod(grid), demo(grid, device, dtype), 1 if gpu else 8),
        "structured": (math.prod(VIDEO), structured(12 if gpu else 4, device, dtype), 32),
    }
    started, rows, conditions = time.perf_counter(), [], []
    for name, (tokens, inputs, every) in sources.items():
        if args.only and name not in args.only or name == "SmolLM2" and args.text is None:
            continue
        exact = args.exact or not gpu
        replay = partial(exactly, every=every) if exact else by_kernels
        found: dict[str, list[Errors]] = {}
        begun, calls = time.perf_counter(), []
        try:
            for calls in inputs:
                if exact:
                    gate(calls[0])
                shape, before = calls[0].grid, calls[0].before
                ways: dict[str, Tensor | None] = orders(device, shape, before) if shape else {"row-major": None}
                ways.pop("random", None)
                if shape and shape[0] == 1:
                    ways.pop("time-major")  # row-major, in a picture
                for order, permutation in ways.items():
                    found.setdefault(order, []).extend(replay(call, permutation, SETTINGS) for call in calls)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue
        new = [dict(source=name, order=order) | row for order, errors in found.items() for row in summary(errors)]
        heads = calls[0].q.shape[1]
        conditions.append(dict(source=name, tokens=tokens, heads=heads, calls=len(found["row-major"]),
                               of_query_blocks=every if exact else 1, seconds=round(time.perf_counter() - begun)))
        print(json.dumps(conditions[-1], ensure_ascii=False), table(new), sep="\n", flush=True)
        rows += new
        args.out.write_text(json.dumps(dict(
            mode="real", card=torch.cuda.get_device_name() if gpu else platform.machine(), torch=torch.__version__,
            arithmetic="exact" if exact else "kernels", date=time.strftime("%Y-%m-%d"), levels=LEVELS,
            sources=conditions, rows=rows), ensure_ascii=False).replace('{"source"', '\n{"source"') + "\n",
            encoding="utf-8")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    with torch.inference_mode():
        main()

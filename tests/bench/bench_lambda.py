"""What the λ test can skip on real attention: `python -m tests.bench.bench_lambda`.

For the calls of the sources of `bench_real`, it prints the share of P·V that the test skips where it decides for groups
of 16 rows, and where for whole tiles of a block pair, which is what a thread block can leave out; with every block and
with those of cdf 0.98, by thresholds. L1 is what the groups lose. It needs no GPU. A source whose files are missing is
left out.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import BlockShape, SpargeParams
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds
from comfyui_spargeattn.kernels.formats import LOG2E, ROW_GROUP
from comfyui_spargeattn.kernels.reference import in_blocks, predict_map, visibility
from tests.bench.bench_real import SHORTER, demo, photographs, structured, text
from tests.bench.replay import Call

BLOCK = BlockShape(64, 128)  # of Hopper with INT8
LIMITS = (6.0, 8.0, 10.0, 15.0)  # the widget pv_threshold
SELECTIONS = {"every block": SpargeParams(cdf_threshold=1.0),
              "cdf 0.98": SpargeParams(cdf_threshold=0.98, similarity_threshold=-1.0)}


def measure(call: Call, params: SpargeParams, every: int) -> Tensor:
    """(limits, 5): kept groups of rows, those skipped, those in tiles skipped whole, Σ|O−O'| and Σ|O|; of every
    `every`-th block of queries."""
    spec = CallSpec(Thresholds.of(params, call.q.device), causal=call.causal, sink_keys=call.sinks)
    queries, keys, values = in_blocks(call.q, call.k, call.v, spec, BLOCK)
    rules = visibility(call.q.shape[2], keys, BLOCK, call.causal)
    kept = predict_map(queries, keys, rules, spec.thresholds, spec.scale_for(call.q.shape[3]))[0]
    k, v = keys.tokens[0].flatten(1, 2), values[0].flatten(1, 2)
    factor, tokens = spec.scale_for(call.q.shape[3]) * LOG2E, torch.arange(k.shape[1])
    found = torch.zeros(len(LIMITS), 5)
    for i in range(every // 2, call.q.shape[2] // BLOCK.q, every):  # whole blocks of queries
        rows = tokens[i * BLOCK.q:(i + 1) * BLOCK.q]
        allowed = keys.valid[0].flatten(1)[:, None] & kept[:, i].repeat_interleave(BLOCK.k, -1)[:, None]
        if call.causal:
            allowed = allowed & (tokens <= rows[:, None])
        scores = (queries.tokens[0, :, i] * factor @ k.mT).masked_fill(~allowed, -math.inf)
        local = scores.unflatten(-1, (-1, BLOCK.k)).amax(-1)  # [H, rows, k_blocks]
        below = local - local.cummax(-1).values.clamp(min=-1e30)
        groups = below.unflatten(1, (-1, ROW_GROUP)).amax(2)  # [H, groups, k_blocks]
        p = scores.softmax(-1)
        exact = p @ v
        for limit, row in zip(LIMITS, found):
            skipped = (groups < -limit) & kept[:, i, None]
            whole = skipped.all(1).sum() * skipped.shape[1]
            left = p.unflatten(-1, (-1, BLOCK.k)) * ~skipped.repeat_interleave(ROW_GROUP, 1)[..., None]
            lost = (left.flatten(-2) @ v - exact).abs().sum()
            row += torch.stack([kept[:, i].sum() * skipped.shape[1], skipped.sum(), whole, lost, exact.abs().sum()])
    return found


def report(name: str, inputs: Iterable[list[Call]], every: int) -> None:
    found = {selection: torch.zeros(len(LIMITS), 5) for selection in SELECTIONS}
    for calls in inputs:
        for selection, params in SELECTIONS.items():
            found[selection] += sum(measure(call, params, every) for call in calls)
    for selection, sums in found.items():
        cells = [f"{limit:g}: {groups / all_:.1%} {whole / all_:.1%} {lost / size:.0e}"
                 for limit, (all_, groups, whole, lost, size) in zip(LIMITS, sums.tolist())]
        print(f"| {name} | {selection} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a plain text, or Rdata.rdb of R's janeaustenr, for SmolLM2")
    args = parser.parse_args()
    on = "cpu", torch.float32
    sources = {"demo model": (demo(SHORTER, *on), 6), "DINOv2, 1036²": (photographs(1036, *on), 8),
               "structured": (structured(2, *on), 64)}
    if args.text is not None:
        sources["SmolLM2, 4096 tokens"] = text(args.text, 4096, *on), 8
    for name, (inputs, every) in sources.items():
        try:
            report(name, inputs, every)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()

"""Predict launch configurations of the attention kernel from its machine code, without a GPU:
`python -m tests.bench.count_instructions`.

It compiles every candidate for every architecture, head_dim and format of P·V in the plain variant, reads registers,
spills, shared memory and the inner loop from the assembly, and bounds the time of a block pair from below by the rates
in `rates.py`. `rank` sorts the candidates; the first few are compiled in every other variant, until one spills in none.
Nothing is timed: occupancy and latency are not in a bound. --arch, --head-dim and --pv-dtype choose some cells, which
take the place of older ones in results/predicted.json; --variants chooses those that must not spill. predicted.md is
written from all cells.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
# The compile scripts import one another by bare names.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels/_triton"))

import torch
import triton
from compiler import SHARED_LIMITS, cause, compile_launches, disassembly, resources
from variants import FORMATS, run, variants

from comfyui_spargeattn.kernels import capability
from comfyui_spargeattn.kernels._triton import pipeline
from comfyui_spargeattn.kernels._triton.config import AttendConfig, attend_config
from comfyui_spargeattn.kernels.types import BlockShape
from tests.bench.inner_loop import inner_loop
from tests.bench.predicted_page import page
from tests.bench.rates import MULTIPROCESSORS, Multiprocessor

HERE = Path(__file__).parent
KERNEL = "_attend_kernel"
NAME = ("arch", "head_dim", "pv_dtype")  # of a cell
HEAD_DIMS = (64, 128, 256)
# (block of Q, block of K, warps), those first that are taken where nothing else decides: by family and head_dim.
SHAPES = {
    "mma": {64: ((128, 64, 4), (128, 64, 8), (64, 64, 4), (128, 128, 8)),
            128: ((128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 128, 8)),
            256: ((64, 32, 8), (64, 64, 8), (128, 32, 8))},
    "wgmma": {64: ((64, 128, 4), (128, 64, 4), (64, 64, 4)), 128: ((64, 128, 4), (128, 64, 4), (64, 64, 4)),
              256: ((64, 64, 4), (128, 64, 8))},
    "cdna": {64: ((128, 64, 4), (128, 64, 8), (64, 64, 4)), 128: ((128, 64, 4), (128, 64, 8), (64, 64, 4)),
             256: ((64, 32, 4), (128, 32, 4), (64, 32, 8))},
    "rdna": {64: ((128, 64, 8), (128, 32, 8), (64, 64, 4), (128, 64, 4)),
             128: ((128, 64, 8), (128, 64, 16), (128, 32, 8), (128, 32, 16), (64, 32, 8), (64, 32, 4)),
             256: ((64, 32, 8), (128, 32, 16), (64, 32, 16))},
}
FAMILIES = {"sm90": "wgmma", "sm100": "wgmma", "gfx942": "cdna", "gfx1100": "rdna", "gfx1201": "rdna"}
STAGES = {"mma": (2, 3), "wgmma": (2, 3), "cdna": (1, 2), "rdna": (1, 2)}
CAPS = {4: (168, 128), 8: (128,)}  # three and four thread blocks of four warps, or two of eight
STEP = 0.1  # bounds this near count as equal
PROMISED_DIM = 128  # up to which no variant may spill
MORE_STAGES, ATTEMPTS = 2, 5  # shapes of a cell that are tried with more stages, and those whose variants are compiled


class Compiler:
    """Compiles the attention kernel for one architecture."""

    def __init__(self, arch: str):
        self.arch, self.of = arch, MULTIPROCESSORS[arch]
        self.family = FAMILIES.get(arch, "mma")
        capability.arch_of = lambda device: arch
        self._compiled = compile_launches(arch, lambda kernel: kernel == KERNEL)

    def kernel(self, dim: int, pv_dtype: str, config: AttendConfig, variant: str = "plain"):
        """The kernel as a call launches it. Raises what the compiler raises."""
        pipeline.attend_config = lambda *key: config
        run(dim, torch.bfloat16, pv_dtype, *variants()[variant])
        _, kernel = self._compiled.pop()
        if isinstance(kernel, Exception):
            raise kernel
        return kernel

    def resources(self, dim: int, pv_dtype: str, config: AttendConfig, variant: str) -> dict:
        """Registers, spills, shared memory and residents of a variant, or its error."""
        try:
            return self._resources(self.kernel(dim, pv_dtype, config, variant), config)
        except Exception as error:
            return dict(error=cause(error))

    def measured(self, dim: int, pv_dtype: str, config: AttendConfig) -> dict:
        """All that the plain variant's assembly tells, as the JSON file has it; or its error."""
        row = dict(block=asdict(config.block), warps=config.warps, stages=config.stages, maxnreg=config.maxnreg)
        try:
            kernel = self.kernel(dim, pv_dtype, config)
            block = dict(block_q=config.block.q, block_k=config.block.k)
            loop = inner_loop(disassembly(kernel), dim=dim, warps=config.warps, lanes=self.of.lanes, **block)
        except Exception as error:
            return row | dict(error=cause(error))
        clocks = bounds(self.of, loop, config.warps)
        dense = dense_bound(self.of, dim=dim, **block)
        return row | self._resources(kernel, config) | asdict(loop) | dict(
            clocks=clocks, bound=max(clocks.values()), dense_bound=dense, ratio=dense / max(clocks.values()))

    def _resources(self, kernel, config: AttendConfig) -> dict:
        found = resources(kernel)
        fits = found["shared"] <= SHARED_LIMITS[self.arch]
        resident = self.of.resident(config.warps, found["registers"], found["shared"]) if fits else 0
        return found | dict(thread_blocks=resident, resident_rows=resident * config.block.q)


def bounds(of: Multiprocessor, loop, warps: int) -> dict[str, float]:
    """Clocks of a multiprocessor that a block pair takes at least, by what it keeps busy."""
    return dict(tensor=sum(work / of.tensor[kind] for kind, work in loop.tensor.items()),
                issue=loop.vector * warps / of.issue,
                exponentials=loop.exponentials * warps * of.lanes / of.exponentials,
                shared=loop.shared_bytes * warps / of.shared_bytes)


def dense_bound(of: Multiprocessor, *, block_q: int, block_k: int, dim: int) -> float:
    """The same for dense 16-bit attention: both products with fp32 sums, and an exponential a score."""
    scores = block_q * block_k
    return max(2 * scores * dim / of.dense_rate, scores / of.exponentials)


def usable(row: dict) -> bool:
    return "error" not in row and row["thread_blocks"] > 0


def rank(row: dict) -> tuple:
    """Sorts candidates: no spills, then the bound beside that of dense attention, then resident rows of Q, then all
    that a block pair keeps busy, then stages."""
    busy = sum(row["clocks"].values()) / row["dense_bound"]
    return (row["spilled"] > 0, -round(math.log(row["ratio"]) / STEP), -row["resident_rows"],
            round(math.log(busy) / STEP), -row["stages"])


def candidates(compiler: Compiler, dim: int, pv_dtype: str, shipped: AttendConfig) -> list[tuple[AttendConfig, dict]]:
    """Configurations with their rows, by rank, then those that can't run. More stages are tried for the first shapes,
    caps of registers where a kernel takes about as many: under one the assembler also spends them freely, where it else
    may spill a few for a thread block more."""
    few, *more = STAGES[compiler.family]
    found = []

    def add(config: AttendConfig):
        if config in dict(found):
            return
        row = compiler.measured(dim, pv_dtype, config)
        found.append((config, row))
        for cap in CAPS.get(config.warps, ()) if compiler.arch.startswith("sm") and config.maxnreg is None else ():
            if 0.8 * cap <= row.get("registers", 0) <= 1.2 * cap:
                add(replace(config, maxnreg=cap))
        found.sort(key=lambda pair: rank(pair[1]) if usable(pair[1]) else (2,))

    for q, k, warps in SHAPES[compiler.family][dim]:
        add(replace(shipped, block=BlockShape(q, k), warps=warps, stages=few, maxnreg=None))
    for config, stages in itertools.product([config for config, row in found if usable(row)][:MORE_STAGES], more):
        add(replace(config, stages=stages))
    return found


def cell(compiler: Compiler, dim: int, pv_dtype: str, names: list[str]) -> dict:
    """What is known of an architecture, head_dim and format: the shipped configuration, the candidates, and as `best`
    the first of them whose variants fit and don't spill; beyond `PROMISED_DIM` they may spill."""
    shipped = attend_config(compiler.arch, dim, pv_dtype)
    found = candidates(compiler, dim, pv_dtype, shipped)
    if shipped not in dict(found):
        found.append((shipped, compiler.measured(dim, pv_dtype, shipped)))
    best = None
    for config, row in [pair for pair in found if usable(pair[1])][:ATTEMPTS]:
        row["variants"] = {}
        for name in names:
            found_there = row["variants"][name] = compiler.resources(dim, pv_dtype, config, name)
            if not usable(found_there) or found_there["spilled"] and dim <= PROMISED_DIM:
                break
        else:
            best = row
            break
    return dict(arch=compiler.arch, head_dim=dim, pv_dtype=pv_dtype, shipped=dict(found)[shipped], best=best,
                candidates=[row for _, row in found])


def cells(arch: str, dims: list[int], pv_dtypes: list[str] | None, names: list[str]) -> list[dict]:
    """The cells of an architecture. A process compiles for one alone: Triton remembers the first."""
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compiler, found = Compiler(arch), []
        for dim, pv_dtype in itertools.product(dims, FORMATS):
            if pv_dtypes is None or pv_dtype in pv_dtypes:
                found.append(cell(compiler, dim, pv_dtype, names))
                print(summary(found[-1]), file=sys.stderr, flush=True)
        return found


def merged(path: Path, found: list[dict]) -> dict:
    """Put cells into a file of results, in place of older ones of the same name."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(triton=triton.__version__, cells=[])
    if old["triton"] != triton.__version__:
        sys.exit(f"{path} is of Triton {old['triton']}, not {triton.__version__}")
    both = {tuple(cell[key] for key in NAME): cell for cell in old["cells"] + found}
    order = list(MULTIPROCESSORS)
    results = old | dict(cells=sorted(both.values(), key=lambda cell: (order.index(cell["arch"]), cell["head_dim"])))
    lines = ",\n".join(map(json.dumps, results["cells"]))
    path.write_text(f'{{"triton": "{results["triton"]}", "cells": [\n{lines}\n]}}\n', encoding="utf-8")
    return results


def summary(found: dict) -> str:
    """A line for each of the first candidates of a cell."""
    lines = [f"{found['arch']} head_dim {found['head_dim']} {found['pv_dtype']}"]
    for label, row in [("shipped", found["shipped"]), ("best", found["best"] or {}),
                       *(("", row) for row in found["candidates"])]:
        if "error" in row or not row:
            lines.append(f"  {label:8}{row.get('block')} {row.get('error', 'none')}"[:120])
            continue
        spills = [f"{name}: {x.get('spilled', 'error')}" for name, x in row.get("variants", {}).items()
                  if x.get("spilled", 1)]
        clocks = " ".join(f"{name} {value:.0f}" for name, value in row["clocks"].items())
        lines.append(f"  {label:8}{row['block']['q']}×{row['block']['k']}, {row['warps']}, {row['stages']}"
                     f"{', ' + str(row['maxnreg']) if row['maxnreg'] else ''}: {row['registers']} registers, "
                     f"{row['spilled']} spilled, {row['shared'] / 1024:.0f} KB, {row['thread_blocks']} resident, "
                     f"{row['instructions']:.0f} instructions, {clocks}, ratio {row['ratio']:.2f} {'; '.join(spills)}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", nargs="+", default=list(MULTIPROCESSORS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--pv-dtype", nargs="+")
    parser.add_argument("--variants", nargs="*", default=list(variants())[:0:-1])
    parser.add_argument("--out", type=Path, default=HERE / "results/predicted.json")
    parser.add_argument("--page", type=Path, default=HERE / "predicted.md")
    arguments = parser.parse_args()
    jobs = [(arch, arguments.head_dim, arguments.pv_dtype, arguments.variants) for arch in arguments.arch]
    # Modules are imported anew in each process, so that none compiles for two architectures.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for job in jobs:
            results = merged(arguments.out, pool.apply(cells, job))
    arguments.page.write_text(page(results, PROMISED_DIM), encoding="utf-8")

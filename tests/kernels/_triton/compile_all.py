"""Compile every kernel as a call on another architecture would, without its hardware: `python compile_all.py sm90`.

Prints one JSON line a kernel: its name, the call, and registers, spilled bytes and shared memory or the error; for an
architecture that the pack declines with this Triton, the reason alone. The launchers run as they are; only the launch
is replaced by a compilation, so types, specialisations and configurations are the real ones. Runs with every Triton
that the kernels support.
Options: head_dims (64 128 unless given), --thin (see `compile_calls`).
Runs in a process of its own because the interpreter (TRITON_INTERPRET) and the compiler exclude each other.
"""
import itertools
import json
import os
import sys
from dataclasses import replace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from compiler import CompileOnlyDriver, assembly, cause, resources
from triton.runtime.jit import JITFunction

from comfyui_spargeattn.kernels import Residual, capability
from comfyui_spargeattn.kernels._triton import pipeline
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds

# Largest shared memory of one thread block in bytes.
SHARED_LIMITS = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10,
                 "sm120": 99 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10}


def run(q, switch: CallSpec, residual: str) -> None:
    """A call on q for q, k and v. residual: none, made, or added and then beside a log-sum-exp."""
    out = torch.empty_like(q)
    if residual == "made":
        pipeline.residual(q, q, q, out, switch)
    elif residual == "added":
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        pipeline.attention(q, q, q, out, lse, replace(switch, residual=Residual.empty(q.shape, q.device)))
    else:
        pipeline.attention(q, q, q, out, None, switch)


def compile_calls(arch: str, dims, dtypes, thin: bool = False):
    """Yield (call, name of the kernel, compiled kernel or exception) over head_dims, dtypes and every switch that makes
    another kernel.

    thin: every configuration without switches, and every switch at one of the head_dims only.
    """
    triton.runtime.driver.set_active(CompileOnlyDriver(arch))
    compiled = []
    launch = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler raises; the other kernels are still of interest
            kernel = error
        compiled.append((self.__name__, kernel))

    JITFunction.run = compile_instead
    pipeline.arch_of = lambda device: arch
    formats = "fp16", "int8"
    cdf, topk, skipping = (Thresholds(selection, (0.9, 0.5, pv_threshold)) for selection, pv_threshold in
                           (("cdf", float("inf")), ("topk", float("inf")), ("cdf", 10.0)))
    switches = [CallSpec(cdf), CallSpec(topk, skipped="pooled", key_bias=torch.zeros(1, 256)),
                CallSpec(cdf, causal=True, key_padding_mask=torch.zeros(1, 256, dtype=torch.bool)),
                CallSpec(skipping, order=torch.arange(256, dtype=torch.int32))]
    calls = itertools.product(range(len(dims)), dtypes, formats, range(len(switches)))
    for i, dtype, pv_dtype, j in calls:
        if thin and j > 0 and j % len(dims) != i:
            continue
        dim, switch = dims[i], switches[j]
        q = torch.zeros(1, 2, 256, dim, dtype=dtype)
        switch = replace(switch, pv_dtype=pv_dtype, return_stats=True)
        call = dict(dim=dim, dtype=str(dtype), pv_dtype=pv_dtype, causal=switch.causal, skipped=switch.skipped,
                    skip_pv=switch.thresholds is skipping)
        for residual in ("none", "added", "made"):
            if residual == "none" or (j == 0 and (i == len(dims) // 2 or not thin)):
                run(q, switch, residual)
                for name, kernel in compiled:
                    yield call | dict(residual=residual), name, kernel
                compiled.clear()


def serialised(kernel) -> bool:
    """Whether the assembler made every tensor-core instruction of an sm90 kernel wait for the one before, as it does
    where registers are short: each then stands in a group of its own."""
    text = assembly(kernel, "nvdisasm", "-c")
    products = text.count("GMMA.")
    assert products, "no tensor-core instructions"
    return text.count("WARPGROUP.ARRIVE") >= products


if __name__ == "__main__":
    arch, *dims = (argument for argument in sys.argv[1:] if argument != "--thin")
    capability.arch_of = lambda device: arch
    implementation, reason = capability.select_implementation(torch.empty(1, 64, dtype=torch.bfloat16))
    if implementation != "triton":
        print(json.dumps(dict(arch=arch, declined=reason)))
        sys.exit()
    seen = set()
    for call, name, kernel in compile_calls(arch, [int(d) for d in dims] or (64, 128), (torch.bfloat16,),
                                            thin="--thin" in sys.argv):
        line = dict(arch=arch, kernel=name, **call)
        if isinstance(kernel, Exception):
            print(json.dumps(line | dict(error=cause(kernel))), flush=True)
        elif kernel.hash not in seen:
            seen.add(kernel.hash)
            wait = arch == "sm90" and name == "_attend_kernel" and serialised(kernel)
            print(json.dumps(line | resources(kernel) | dict(limit=SHARED_LIMITS[arch], serialised=wait)), flush=True)

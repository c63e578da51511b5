"""Compile every kernel as a call on another architecture would, without its hardware: `python compile_all.py sm90`.

Prints one JSON line a kernel: its name, the call, and registers, spilled bytes, shared memory, barriers and, of the
attention kernel, the kinds of tensor instructions and whether P goes through shared memory, or the error; for an
architecture that the pack declines with this Triton, the reason alone. The launchers run as they are; only the launch
is replaced by a compilation, so types, specialisations and configurations are the real ones. Runs with every Triton
that the kernels support.
Options: head_dims (64 128 unless given), --thin (see `compile_calls`).
Runs in a process of its own because the interpreter (TRITON_INTERPRET) and the compiler exclude each other.
"""
import itertools
import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
from compiler import SHARED_LIMITS, cause, compile_launches, disassembly, resources, tensor_instructions
from variants import FORMATS, run, variants

from comfyui_spargeattn.kernels import capability
from comfyui_spargeattn.kernels._triton.config import attend_config
from comfyui_spargeattn.kernels._triton.primitives import channel_tiles
from comfyui_spargeattn.tests.bench.inner_loop import inner_loop

MOST_BARRIERS = 12  # of a block pair; where P becomes an operand through shared memory, it is 13 to 154
BARRIER = r"\bBAR\.SYNC|\bs_barrier\b"


def compile_calls(arch: str, dims, dtypes, thin: bool = False):
    """Yield (call, name of the kernel, compiled kernel or exception) over head_dims, dtypes, formats and variants.

    thin: every configuration in the plain variant, and every other variant at one of the head_dims only and in one
    format, the other one on half of the architectures; on sm90, whose assembler decides by it, in both. Of kernels
    other than attention's, the plain variant in the default format and the one with everything.
    """
    turn = list(SHARED_LIMITS).index(arch)
    chosen = True
    compiled = compile_launches(arch, lambda kernel: chosen or kernel == "_attend_kernel")
    calls = itertools.product(range(len(dims)), dtypes, FORMATS, enumerate(variants().items()))
    for i, dtype, pv_dtype, (j, (variant, call)) in calls:
        if thin and variant != "plain" and (j % len(dims) != i or arch != "sm90"
                                            and FORMATS[(j + turn) % len(FORMATS)] != pv_dtype):
            continue
        default = variant == "plain" and pv_dtype == capability.pv_format("auto", arch, dims[i])
        chosen = not thin or default or variant == "everything"
        run(dims[i], dtype, pv_dtype, *call)
        for name, kernel in compiled:
            yield dict(dim=dims[i], dtype=str(dtype), pv_dtype=pv_dtype, variant=variant), name, kernel
        compiled.clear()


def serialised(text: str) -> bool:
    """Whether the assembler made every tensor-core instruction of an sm90 kernel wait for the one before, as it does
    where registers are short: each then stands in a group of its own."""
    products = text.count("GMMA.")
    assert products, "no tensor-core instructions"
    return text.count("WARPGROUP.ARRIVE") >= products


def barriers(text: str, arch: str, dim: int, pv_dtype: str, **_) -> float:
    """How often the warps wait for each other in a block pair that needs no care."""
    config = attend_config(arch, sum(channel_tiles(dim)), pv_dtype)
    loop = inner_loop(text, block_q=config.block.q, block_k=config.block.k, dim=dim, warps=config.warps, lanes=32)
    return loop.opcodes.get("BAR", 0) / loop.pairs


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
            text = disassembly(kernel)
            line |= resources(kernel) | dict(limit=SHARED_LIMITS[arch], barriers=len(re.findall(BARRIER, text)))
            if name == "_attend_kernel":
                line |= dict(tensor=tensor_instructions(text), serialised=arch == "sm90" and serialised(text))
                auto = capability.pv_format("auto", arch, call["dim"]) == call["pv_dtype"]
                if auto and arch.startswith("sm") and call["variant"] == "plain":
                    line |= dict(waiting=barriers(text, **line) > MOST_BARRIERS)
            print(json.dumps(line), flush=True)

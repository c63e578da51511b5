"""Compare the machine code of the kernels of two checkouts: `python compare_assembly.py OLD NEW --arch sm80 sm90`.

Prints a markdown table, a line a kernel and variant: registers, spilled bytes, shared memory and instructions before
and after, and "same", or the opcodes whose number differs. "same, registers renamed" has the same opcodes in the same
order. Exits 1 where opcodes or resources differ. `--summary` prints a line a kernel and architecture instead. Needs no
GPU.

Every variant is a public call of the package, so that the checkouts may differ in everything below; each is compiled in
a process of its own, with the Triton of this Python. Addresses of parameters are left out of the comparison, because
they follow from the order of a kernel's arguments. NVIDIA alone, with the tools that come with Triton.
"""
import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = "| kernel | variant | registers | spilled | shared | instructions | code |\n" + "|---" * 7 + "|"
SUMMARY = ("| kernel | architecture | variants | same | registers renamed | reordered | other opcodes "
           "| instructions |\n" + "|---" * 8 + "|")
SAME = ("same", "same, registers renamed", "same opcodes in another order")
RESOURCES = ("registers", "spilled", "shared")


def variants(heads: int, tokens: int) -> dict[str, dict]:
    """Public calls that between them use every switch and every optional tensor of the kernels."""
    import torch

    from comfyui_spargeattn.kernels import SpargeParams
    bias, padding = torch.zeros(1, tokens), torch.zeros(1, tokens, dtype=torch.bool)
    per_head = SpargeParams(cdf_threshold=torch.full((heads,), 0.9), similarity_threshold=0.5, pv_threshold=10.0)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return {
        "plain": {},
        "topk, pooled, bias": dict(params=SpargeParams(topk=0.5), skipped="pooled", key_bias=bias),
        "causal, padding": dict(causal=True, key_padding_mask=padding),
        "λ, order, sinks, per head": dict(params=per_head, order=torch.arange(tokens, dtype=torch.int32),
                                          sink_keys=[(0, 1)], dense_queries=[(0, 1)]),
        "map given, pooled, bias": dict(block_map=mask, skipped="pooled", key_bias=bias),
        "map given, causal": dict(block_map=mask, causal=True),
    }


def compile_kernels(arch: str, dims: list[int]) -> dict[str, dict]:
    """'kernel | variant' → resources and normalised instructions of every kernel of the checkout on sys.path."""
    import torch
    import triton
    from compiler import CompileOnlyDriver, assembly, cause, resources
    from triton.runtime.jit import JITFunction

    from comfyui_spargeattn.kernels import block_shape, block_sparse_attention, sparge_attention
    triton.runtime.driver.set_active(CompileOnlyDriver(arch))
    compiled, launch, found = [], JITFunction.run, {}

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_instead
    for name, module in list(sys.modules.items()):
        if name.startswith("comfyui_spargeattn.kernels") and hasattr(module, "arch_of"):
            module.arch_of = lambda device: arch
    heads, tokens = 2, 256
    for dim in dims:
        q = torch.zeros(1, heads, tokens, dim, dtype=torch.bfloat16)
        for pv_dtype in ("fp16", "int8"):
            for variant, call in variants(heads, tokens).items():
                call = dict(call, pv_dtype=pv_dtype, impl="triton", return_stats=True)
                try:
                    if "block_map" in call:
                        blocks = block_shape(q, pv_dtype=pv_dtype, impl="triton").counts(tokens, tokens)
                        block_sparse_attention(q, q, q, call.pop("block_map").expand(1, 1, *blocks), **call)
                    else:
                        sparge_attention(q, q, q, **call)
                except Exception as error:
                    sys.exit(f"{arch}, {variant}: {cause(error)}")
                for kernel, result in compiled:
                    instructions = normalised(assembly(result, "nvdisasm", "-c"))
                    found[f"{kernel} | {dim} {pv_dtype} {variant}"] = resources(result) | dict(code=instructions)
                compiled.clear()
    return found


def normalised(text: str) -> list[str]:
    """The instructions of a disassembly, without their addresses and those of parameters."""
    lines = (re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line) for line in text.splitlines())
    return [re.sub(r"c\[0x0\]\[[^\]]*\]", "c[P]", line[1]).strip() for line in lines if line]


def opcodes(code: list[str]) -> list[str]:
    """The operations alone, without predicates and operands."""
    return [re.sub(r"^@!?U?P\d+ ", "", line).split(" ")[0] for line in code]


def difference(old: list[str], new: list[str]) -> str:
    """What to say of two versions of a kernel: one of `SAME`, or the opcodes whose number changed."""
    if old == new:
        return SAME[0]
    before, after = opcodes(old), opcodes(new)
    if before == after:
        return SAME[1]
    counts = collections.Counter(after)
    counts.subtract(collections.Counter(before))
    changed = {name: number for name, number in sorted(counts.items()) if number}
    return ", ".join(f"{name} {number:+}" for name, number in changed.items()) or SAME[2]


def compile_checkout(checkout: Path, arch: str, dims: list[int]) -> dict[str, dict]:
    """`compile_kernels` for a checkout, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "comfyui_spargeattn").symlink_to(checkout.resolve())
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        process = subprocess.run([sys.executable, __file__, "--compile", arch, *map(str, dims)], env=environment,
                                 stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{checkout} does not compile for {arch}")
    return json.loads(process.stdout)


def main(old: Path, new: Path, arches: list[str], dims: list[int], summary: bool) -> bool:
    """Print the table; whether opcodes and resources are the same everywhere."""
    print(SUMMARY if summary else HEADER)
    unchanged = True
    for arch in arches:
        before, after = (compile_checkout(checkout, arch, dims) for checkout in (old, new))
        assert before.keys() == after.keys(), before.keys() ^ after.keys()
        said = {name: difference(before[name]["code"], after[name]["code"]) for name in before}
        unchanged &= all(word in SAME for word in said.values())
        unchanged &= all(before[name][key] == after[name][key] for name in before for key in RESOURCES)
        for line in summarised(said, arch, before, after) if summary else detailed(said, arch, before, after):
            print("|", " | ".join(map(str, line)), "|", flush=True)
    return unchanged


def detailed(said: dict[str, str], arch: str, before: dict, after: dict):
    """A row for each kernel and variant."""
    for name, word in said.items():
        kernel, variant = name.split(" | ")
        sizes = [(before[name][key], after[name][key]) for key in RESOURCES]
        sizes.append((len(before[name]["code"]), len(after[name]["code"])))
        yield f"`{kernel}`", f"{arch} {variant}", *(f"{old} → {new}" for old, new in sizes), word


def summarised(said: dict[str, str], arch: str, before: dict, after: dict):
    """A row for each kernel: how many variants are the same, and all their instructions together."""
    for kernel in dict.fromkeys(name.split(" | ")[0] for name in said):
        words = {name: word for name, word in said.items() if name.split(" | ")[0] == kernel}
        counts = [sum(word == same for word in words.values()) for same in SAME]
        old, new = (sum(len(side[name]["code"]) for name in words) for side in (before, after))
        yield f"`{kernel}`", arch, len(words), *counts, len(words) - sum(counts), f"{old} → {new}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        print(json.dumps(compile_kernels(sys.argv[2], [int(dim) for dim in sys.argv[3:]])))
        sys.exit()
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--arch", nargs="+", default=["sm80", "sm90"])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    sys.exit(not main(arguments.old, arguments.new, arguments.arch, arguments.dims, arguments.summary))

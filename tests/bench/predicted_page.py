"""The page of predicted launch configurations, in Markdown, from what `count_instructions.py` finds."""
from __future__ import annotations

from tests.bench.rates import MULTIPROCESSORS

CARDS = {"sm80": "A100", "sm86": "RTX 30", "sm89": "RTX 40", "sm120": "RTX 50", "sm90": "H100, H200",
         "sm100": "B200", "gfx942": "MI300", "gfx1100": "RX 7900", "gfx1201": "RX 9070"}
INTRODUCTION = """\
# Predicted: the attention kernel on cards that were not measured

Everything here is **predicted** from machine code, compiled with Triton {triton} without a GPU; nothing on this page
was timed. `python -m tests.bench.count_instructions` writes it and `results/predicted.json`, which has every candidate,
in some twenty minutes of one core.

**Counted**, in the loop over blocks that need no care, without a pooled tail or other switches: tensor instructions by
kind, all instructions, exponentials, and bytes moved between shared memory and registers. The vendors' rates below turn
each into clocks of a multiprocessor (a compute unit on AMD) a block pair. The largest is the **bound**: no launch of
this code takes less time. The **ratio** is the bound of dense 16-bit attention on the same card (both products with
fp32 sums, an exponential a score, and nothing else) over ours, with all blocks kept. Where ours is bound by
instructions, dense attention may be too, and the ratio says too little.

**Not counted**: latency and what hides it, conflicts of banks, barriers, units narrower than the issue of a warp
(integer and conversion instructions, float32 on the A100), traffic of L2 and memory, clock rates under load,
preparation and map. So a ratio is not a speedup. On the H100, where the kernel is measured, tensor cores are busy 40%
of the time.

Candidates are ranked by: no spills, the bound in steps of a tenth, rows of Q resident on a multiprocessor, the sum of
all that a block pair keeps busy, stages. The first whose other variants (λ test, causal, padding, bias, pooled tail,
order, residuals, log-sum-exp, and all at once) fit and don't spill either is **best**; beyond head_dim {promised} they
may spill. Rows of sm90 stay as they were measured, whatever stands here; `config.py` says where else
the table takes another.

A configuration is block of Q × block of K, warps, stages, and a cap of registers if there is one. *blocks* are thread
blocks resident on a multiprocessor; clocks are of a block pair. Below the shipped and the best configuration stands the
next candidate of another shape. Spills, in bytes a thread, are the most that was found; a candidate's variants are
compiled until one spills. Instructions are of a warp, products of four on sm90 and of the thread block on sm100.
"""
TABLE = ("| head_dim | P·V | configuration | registers, spilled | shared KB | blocks | products "
         "| other instructions | tensor | issue | exp2 | shared | ratio |\n" + "|---" * 13 + "|")
RATES = ("| architecture | int8 | fp16, fp32 sums | fp16, fp16 sums | fp8, fp32 sums | fp8, fp16 sums | issue | exp2 "
         "| shared bytes |\n" + "|---" * 9 + "|")


def page(results: dict, promised: int) -> str:
    """All of the page. promised: the head_dim up to which no variant may spill."""
    parts = [INTRODUCTION.format(triton=results["triton"], promised=promised)]
    arches = dict.fromkeys(cell["arch"] for cell in results["cells"])
    for arch in arches:
        parts += [f"## {arch} ({CARDS[arch]})\n", TABLE]
        for cell in (cell for cell in results["cells"] if cell["arch"] == arch):
            parts += lines_of(cell)
        parts.append("")
    parts += ["## Rates\n", "Multiply-adds of dense products, warps that issue an instruction, exponentials and bytes, "
              "in a clock of a multiprocessor; `rates.py` names the sources.\n", RATES]
    for arch in arches:
        of = MULTIPROCESSORS[arch]
        kinds = ("int8", "fp16, fp32 sums", "fp16, fp16 sums", "fp8, fp32 sums", "fp8, fp16 sums")
        parts.append(f"| {arch} | " + " | ".join(str(of.tensor.get(kind, "–")) for kind in kinds)
                     + f" | {of.issue} | {of.exponentials} | {of.shared_bytes} |")
    return "\n".join(parts) + "\n"


def lines_of(cell: dict) -> list[str]:
    """The shipped configuration, the best, and the next of another block shape or number of warps."""
    shown = {"shipped": cell["shipped"], "best": cell["best"]}
    if cell["best"] is None:
        shown.pop("best")
    elif configuration(cell["best"]) == configuration(cell["shipped"]):
        shown = {"shipped, best": cell["best"]}
    taken = [(row["block"], row["warps"]) for row in shown.values()]
    others = [row for row in cell["candidates"]
              if row.get("thread_blocks") and (row["block"], row["warps"]) not in taken]
    lines = [line(cell, row, f"**{name}** ") for name, row in shown.items()]
    if cell["best"] is None:
        lines.append(f"| {cell['head_dim']} | {cell['pv_dtype']} | **best** none without spills |" + " |" * 10)
    return lines + [line(cell, row, "") for row in others[:1]]


def configuration(row: dict) -> str:
    cap = f", {row['maxnreg']}" if row["maxnreg"] else ""
    return f"{row['block']['q']}×{row['block']['k']}, {row['warps']}, {row['stages']}{cap}"


def line(cell: dict, row: dict, name: str) -> str:
    start = f"| {cell['head_dim']} | {cell['pv_dtype']} | {name}{configuration(row)} |"
    if "error" in row:
        return f"{start} {row['error'].replace('|', '/')} |" + " |" * 9
    spilled = max([row["spilled"], *(x.get("spilled", 0) for x in row.get("variants", {}).values())])
    products = ", ".join(f"{number} {opcode}" for opcode, number in row["products"].items())
    other = row["instructions"] - sum(row["products"].values()) / row["pairs"]
    clocks = " | ".join(f"{row['clocks'][name]:.0f}" for name in ("tensor", "issue", "exponentials", "shared"))
    return (f"{start} {row['registers']}, {spilled} | {row['shared'] / 1024:.0f} | {row['thread_blocks']} | {products} "
            f"| {other:.0f} | {clocks} | {row['ratio']:.2f} |")

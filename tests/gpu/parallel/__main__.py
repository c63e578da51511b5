"""A video model and an attention call on one GPU and on two: errors between them, times and speed-up.

    NCCL_NVLS_ENABLE=0 python -m comfyui_spargeattn.tests.gpu.parallel [--out FILE]

Needs diffusers and yunchang on PYTHONPATH; xfuser 0.4.5 is measured too where it is there. Two processes, NCCL:

- diffusers' Wan transformer in the shape of Wan 2.1 1.3B at 480p (30 layers, 12 heads of 128, 21×30×52 = 32760 tokens,
  bf16, random weights), dense and with SpargeAttn, by context parallelism: by heads (Ulysses) and as a ring.
- an attention call of that shape through yunchang's and xDiT's attention. With `cdf`, the heads stand in the order of
  what they keep, which is the worst one for Ulysses; `balanced` spreads them over the GPUs.

Prints a table and one JSON object, and fails where an error is above its bound. The time is the slower GPU's, the
median of calls that both begin together. `--device cpu --tiny` runs the same code on a CPU, with gloo, the reference
and a small shape.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from comfyui_spargeattn.tests.gpu.parallel.processes import process


def table(found: dict) -> str:
    """A row a measurement."""
    columns = "part", "attention", "where", "ms", "speed-up", "L1 to one GPU", "L1 to dense", "kept by each GPU"
    rows = [columns, ("---",) * len(columns)]
    for part, of_part in found.items():
        for name, of_name in of_part.items():
            for where, facts in of_name.items():
                kept = (f"{facts[x]:.3f}" for x in ("kept by the busier GPU", "kept by the other") if x in facts)
                rows.append((part, name, where, f"{facts['ms']:.2f}", f"{of_name['one GPU']['ms'] / facts['ms']:.2f}",
                             f"{facts['L1 to one GPU']:.2g}", f"{facts['L1 to dense']:.2g}", ", ".join(kept)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--layers", type=int, default=30, help="of the model that is not tiny")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast over NVLink can disturb the host's other users
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options.out = options.out or Path(folder) / "found.json"
        torch.multiprocessing.spawn(process, (f"file://{folder}/meeting", options), nprocs=2)
        report = json.loads(options.out.read_text())
    print(table(report["found"]))
    print(json.dumps(report))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if report["faults"]:
        sys.exit("\n".join(report["faults"]))


if __name__ == "__main__":
    main()

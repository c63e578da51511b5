"""Error of the log-sum-exp that `return_lse` gives, against float64: `python -m tests.bench.bench_lse --out lse.json`.

float64 computes the definition over the blocks of the call's own map, of the same q and k in 16 bits, so that what is
left is the error of the arithmetic. On a CPU the reference runs, and the Triton kernels in Triton's interpreter where
TRITON_INTERPRET=1 is set.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
from itertools import product
from pathlib import Path

import torch

from comfyui_spargeattn.kernels import SpargeParams, block_map, sparge_attention
from tests.bench.bench_attention import table
from tests.cases import drifting_qkv
from tests.kernels.test_lse import exact_lse

HALF = SpargeParams(topk=0.5)
CONSTANTS = 0.0, 3.0, 30.0  # added to every number of K, which the kernels remove
GAINS = {"sharp": 1.0, "flat": 0.2}  # of Q; where attention is flat, what is skipped matters
GPU_TOKENS, CPU_TOKENS = 8192, 520


def measure(impl: str, pv_dtype: str, dim: int, attention: str, skipped: str, dtype: torch.dtype, tokens: int,
            device: str) -> dict:
    """Calls of 4 heads over 2 of K: for each constant, the root mean square and the largest error."""
    q, k, v = drifting_qkv(1, 4, tokens, dim, kv_heads=2, device=device)
    q, v = (q * GAINS[attention]).to(dtype), v.to(dtype)
    how = dict(params=HALF, pv_dtype=pv_dtype, impl=impl)
    row = dict(impl=impl, pv_dtype=pv_dtype, head_dim=dim, attention=attention, skipped=skipped)
    for constant in CONSTANTS:
        shifted = (k + constant).to(dtype)
        found = block_map(q, shifted, **how)
        _, lse = sparge_attention(q, shifted, v, skipped=skipped, return_lse=True, **how)
        error = (lse - exact_lse(q, shifted, found.mask(), found.block, params=HALF, skipped=skipped)).abs()
        row |= {f"K + {constant:g}, RMS": error.square().mean().sqrt().item(),
                f"K + {constant:g}, largest": error.amax().item()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    # The interpreter does not multiply bfloat16.
    device, tokens, dtype = ("cuda", GPU_TOKENS, torch.bfloat16) if on_gpu else ("cpu", CPU_TOKENS, torch.float16)
    calls = [("reference", "auto", 64)]
    if on_gpu or os.environ.get("TRITON_INTERPRET") == "1":
        calls += [("triton", pv_dtype, dim) for pv_dtype in ("int8", "fp16") for dim in (64, 128)]
    rows = []
    for call, attention, skipped in product(calls, GAINS, ("drop", "pooled")):
        rows.append(measure(*call, attention, skipped, dtype, tokens, device))
        print(rows[-1], flush=True)
    print(table(rows))
    if args.out:
        report = dict(card=torch.cuda.get_device_name() if on_gpu else platform.machine(), torch=torch.__version__,
                      tokens=tokens, dtype=str(dtype), rows=rows)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

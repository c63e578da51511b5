"""One of the two processes of the benchmark of two GPUs, and the bounds of what they find."""
from __future__ import annotations

import argparse
import json
from datetime import timedelta

import torch
import torch.distributed as dist

from comfyui_spargeattn.tests.gpu.parallel.call import measure_call
from comfyui_spargeattn.tests.gpu.parallel.model import measure_model
from comfyui_spargeattn.tests.gpu.parallel.setup import Setup

# Relative L1. By heads, two GPUs compute the same maps: what is left is the rounding of the model's other layers. A
# ring selects from each half of the keys by itself. Where all that matters lies in one half, that is half of what one
# GPU would keep.
ULYSSES, EVERY_BLOCK, RING = 0.02, 0.06, 1.1


def faults(found: dict) -> list[str]:
    """What is above its bound."""
    wrong = []
    for part, of_part in found.items():
        for name, of_name in of_part.items():
            for where, facts in of_name.items():
                to_one, to_dense = facts["L1 to one GPU"], facts["L1 to dense"]
                at_half = of_part["topk 0.25"]["one GPU"]["L1 to dense"]
                for what, error, bound in (
                        ("one GPU", to_one, ULYSSES if "ulysses" in where else None),
                        ("dense", to_dense, EVERY_BLOCK if name == "every block" else None),
                        ("dense", to_dense, RING * at_half if "ring" in where and name == "topk 0.5" else None)):
                    if bound is not None and not error <= bound:
                        wrong.append(f"{part}, {name}, {where}: relative L1 to {what} {error:.4g} > {bound:.4g}")
                if name != "dense" and not facts.get("calls", {"sparse": 1}).get("sparse"):
                    wrong.append(f"{part}, {name}, {where}: nothing went sparse: {facts['calls']}")
    return wrong


def process(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """One of the two; the first one reports."""
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    setup = Setup(rank, device, (2, 16, 16), 4, 32, 2, 256, 2) if options.tiny else (
        Setup(rank, device, (21, 30, 52), 12, 128, options.layers, 8960, 5))
    dist.init_process_group("nccl" if setup.cuda else "gloo", init_method=meeting, world_size=2, rank=rank,
                            timeout=timedelta(seconds=120), device_id=device if setup.cuda else None)
    try:
        found = {"model": measure_model(setup), "call": measure_call(setup)}
        if rank == 0:
            card = torch.cuda.get_device_name() if setup.cuda else "CPU"
            report = dict(card=card, torch=torch.__version__, grid=setup.grid, layers=setup.layers, heads=setup.heads,
                          dim=setup.dim, found=found, faults=faults(found))
            options.out.write_text(json.dumps(report, indent=1))
    finally:
        dist.destroy_process_group()

"""A script run by two processes that share a model or a call."""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from comfyui_spargeattn.tests.kernels.integrations.libraries import DEVICE


def found_by_two(script: str, kind: str, folder: Path) -> list[dict]:
    """What each process of `python -m SCRIPT KIND MEETING RANK` prints as JSON behind "found"; nothing for one that
    prints no such line. Fails with their output if one of them does.

    script: a module beside this one. folder: where they meet.
    """
    command = [sys.executable, "-m", f"{__package__}.{script}", kind, f"file://{folder / 'meeting'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank)], env=environment, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) for rank in range(2)]
    try:
        output = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output)
    return [json.loads(line[6:]) for lines in output for line in lines.splitlines() if line.startswith("found")]


def meet(meeting: str, rank: int) -> None:
    """Join the other process: NCCL on a GPU of each, gloo on the CPU."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=meeting, world_size=2, rank=rank)


def leave() -> None:
    """End the process once the other one is here too.

    Without Python's own end, and with it that of yunchang's groups: they outlive `destroy_process_group`, and of 36
    processes three aborted when gloo's threads of theirs were torn down.
    """
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)

"""A script run by two processes that share a model or a call."""
import json
import os
import subprocess
import sys
from pathlib import Path


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

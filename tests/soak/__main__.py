"""Soak of a ComfyUI server with this pack, on the CPU: ``python -m tests.soak`` with ComfyUI's interpreter.

Run it at the repository's root with COMFYUI_PATH set. README.md beside this file says what it does.
"""
import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

# Before torch: threads that spin while they wait would make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ..nodes.host import comfy_host, comfy_server  # noqa: E402
from .growth import WINDOWS  # noqa: E402
from .run import OPTIONS, Soak, prepare  # noqa: E402
from .verdict import figures, problems  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000, help="how many to send; default 1000")
    parser.add_argument("--recipes", type=int, default=40, help="how many different ones; default 40")
    parser.add_argument("--minutes", type=float, default=60, help="longest time; default 60")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="default: by the clock")
    options = parser.parse_args()
    least = 2 * options.recipes + WINDOWS
    if options.prompts < least:
        parser.error(f"--prompts must be at least {least} with {options.recipes} recipes; got {options.prompts}")
    print(f"seed {options.seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the server ends too
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = Path(folder)
        comfy_host.configure(base, cpu=True)
        prepare(base)
        start = time.monotonic()
        with comfy_server.running(base, *OPTIONS) as server:
            soak = Soak(server, Random(options.seed), start + 60 * options.minutes)
            soak.run(options.prompts, options.recipes)
    found = problems(soak)
    print(figures(soak, time.monotonic() - start))
    print(*found, sep="\n")
    return bool(found)


raise SystemExit(main())

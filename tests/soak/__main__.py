"""Soak of a ComfyUI server with this pack, on the CPU: ``python -m tests.soak`` with ComfyUI's interpreter."""
import argparse
import os
import tempfile
import time
from pathlib import Path
from random import Random

# Before torch: threads that spin while they wait would make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ..nodes.host import comfy_host, comfy_server  # noqa: E402
from .report import judge  # noqa: E402
from .run import OPTIONS, Soak, prepare  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000, help="how many to send; default 1000")
    parser.add_argument("--recipes", type=int, default=40, help="how many different ones; default 40")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="default: by the clock")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = Path(folder)
        comfy_host.configure(base, cpu=True)
        prepare(base)
        with comfy_server.running(base, *OPTIONS) as server:
            start = time.monotonic()
            soak = Soak(server, Random(options.seed), options.prompts, options.recipes)
            try:
                soak.run()
            finally:
                print(server.log()[-2000:] if soak.problems else "")
        return judge(soak, time.monotonic() - start)


raise SystemExit(main())

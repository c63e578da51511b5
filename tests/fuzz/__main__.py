"""Run many random calls in worker processes. A watchdog ends a process whose call hangs.

    python -m comfyui_spargeattn.tests.fuzz --calls 10000 --seed 0              on a GPU
    python -m comfyui_spargeattn.tests.fuzz --calls 2000 --device cpu           the reference
    python -m comfyui_spargeattn.tests.fuzz --calls 300 --device cpu --impl triton    Triton's interpreter

`--seed ITS_SEED --calls 1` repeats a call that failed.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the others follow it")
    parser.add_argument("--kinds", type=int, default=60, help="skip calls of other kinds than the first so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--impl", choices=("triton", "reference"), help="triton on a GPU, reference on the CPU")
    parser.add_argument("--jobs", type=int, help="worker processes", default=min(12, os.cpu_count() or 1))
    parser.add_argument("--hang", type=float, default=180, help="seconds after which a call counts as hung")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long, with what was checked")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.impl == "triton":
            os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    impl = options.impl or ("triton" if options.device == "cuda" else "reference")
    from comfyui_spargeattn.tests.fuzz.draw import KINDS
    from comfyui_spargeattn.tests.fuzz.watch import Worker, watch
    seeds = [seed for seed in range(options.seed, options.seed + options.calls) if seed % KINDS < options.kinds]
    # A kind stays with one worker, so that no kernel is compiled twice.
    shares = [share for job in range(options.jobs) if (share := [x for x in seeds if x % KINDS % options.jobs == job])]
    started = time.monotonic()
    found = watch([Worker(share, impl) for share in shares], options.hang, options.seconds)
    worst = max(found.ratios, key=lambda pair: pair[0], default=(0.0, None))
    print(f"{len(found.ratios) + len(found.failures)} of {len(seeds)} calls, {len(found.failures)} failed, worst error "
          f"{worst[0]:.3f} of what it may be (seed {worst[1]}), {time.monotonic() - started:.0f} s")
    print("failed seeds:", *sorted(seed for seed, _ in found.failures) or ["none"])
    return bool(found.failures)


if __name__ == "__main__":
    sys.exit(main())

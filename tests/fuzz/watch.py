"""Worker processes that check one call after the other, and the watchdog that ends a process whose call hangs."""
from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import time
from dataclasses import dataclass, field


@dataclass
class Found:
    failures: list[tuple[int, str]] = field(default_factory=list)
    ratios: list[tuple[float, int]] = field(default_factory=list)


class Worker:
    """A process that checks one seed after the other. Another process takes its place when it ends."""

    def __init__(self, seeds: list[int], impl: str):
        self.seeds, self.impl = seeds, impl
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=check_all, args=(theirs, self.seeds, self.impl), daemon=True)
        self.process.start()
        theirs.close()
        self.heard = time.monotonic()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def watch(workers: list[Worker], hang: float, limit: float = math.inf) -> Found:
    """Collect the results of every worker. A silent or dead one fails at its next seed and continues after it.

    hang: seconds of silence. limit: seconds after which all workers end, wherever they are.
    """
    found, workers, end = Found(), list(workers), time.monotonic() + limit
    while workers and time.monotonic() < end:
        ready = multiprocessing.connection.wait([worker.pipe for worker in workers], timeout=1)
        for worker in list(workers):
            gone = time.monotonic() - worker.heard > hang and "hung"
            if worker.pipe in ready:
                worker.heard, gone = time.monotonic(), False
                try:
                    seed, ratio, failure, ends = worker.pipe.recv()
                    worker.seeds = worker.seeds[worker.seeds.index(seed) + 1:]
                    if failure is None:
                        found.ratios.append((ratio, seed))
                    else:
                        found.failures.append((seed, failure))
                        print(f"seed {seed}: {failure}", flush=True)
                except EOFError:
                    ends, gone = True, bool(worker.seeds) and "its process died"
                if not ends:
                    continue
            elif not gone:
                continue
            worker.end()
            if gone:
                found.failures.append((worker.seeds[0], gone))
                print(f"seed {worker.seeds[0]}: {gone}", flush=True)
                worker.seeds = worker.seeds[1:]
            if worker.seeds:
                worker.start()
            else:
                workers.remove(worker)
    for worker in workers:
        worker.end()
    return found


def check_all(pipe, seeds: list[int], impl: str) -> None:
    """Send (seed, ratio, what failed or None, whether this process ends) for each seed."""
    import torch

    from comfyui_spargeattn.tests.fuzz import check
    torch.set_num_threads(1)
    limits = check.EAGER if impl == "reference" else check.TRITON
    for seed in seeds:
        ratio, failure, ends = 0.0, None, seed == seeds[-1]
        try:
            ratio = check.check(seed, limits)
        except AssertionError as error:
            failure = str(error).strip()
        except Exception as error:  # a call may raise anything, and the device may be unusable afterwards
            failure, ends = f"{type(error).__name__}: {error}", True
        pipe.send((seed, ratio, failure, ends))
        if ends:
            return

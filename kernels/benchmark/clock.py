"""How long calls take on a device."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_AHEAD = 2_000_000  # clock cycles, about a millisecond
_ENOUGH = 600.0  # milliseconds that the repetitions of a call take together
_REPEATS = 3, 12


class Clock:
    """Time of the device's own where it has events, so that what the host needs to launch a call does not count."""

    def __init__(self, device: torch.device):
        self._device = device
        self._of = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None

    def seconds(self) -> float:
        """The time of day, for deadlines."""
        return time.monotonic()

    def ms(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self._of is None:
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        with self._of.device(self._device):
            start, end = (self._of.Event(enable_timing=True) for _ in range(2))
            if self._of is torch.cuda:
                torch.cuda._sleep(_AHEAD)  # until the host has launched the call
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)


def median_ms(clock: Clock, run: Callable[[], object], tick: Callable[[], None]) -> float:
    """The median of several calls, of fewer where a call takes long, after one that warms up.

    tick: called before each of them; may raise to end it.
    """
    tick()
    run()
    tick()
    times = [clock.ms(run)]
    least, most = _REPEATS
    while len(times) < min(most, max(least, int(_ENOUGH / max(times[0], 1e-3)))):
        tick()
        times.append(clock.ms(run))
    return statistics.median(times)

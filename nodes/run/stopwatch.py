"""How long attention calls take, without waiting for them."""
from __future__ import annotations

import time

import torch


class Stopwatch:
    """The time from `start` to `stop` on one device; `milliseconds` waits for the device, so it is asked after a run.

    On a GPU two events in the stream measure it, on a CPU the clock does. Other devices are not timed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._start = self._now()
        self._stop = None

    def stop(self) -> Stopwatch:
        self._stop = self._now()
        return self

    def milliseconds(self) -> float | None:
        """None where the device is not timed."""
        if self._start is None or self._stop is None:
            return None
        if isinstance(self._start, float):
            return 1000 * (self._stop - self._start)
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop)

    def _now(self) -> float | torch.cuda.Event | None:
        if self.device.type == "cpu":
            return time.perf_counter()
        # Events of a graph that is being captured belong to the graph and tell no time.
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

"""How long attention calls take, without waiting for them."""
from __future__ import annotations

import time

import torch


class Stopwatch:
    """The time from creation to `stop` on one device. `milliseconds` waits for the device: it is asked after a run.

    Two events in the stream measure it on a GPU, the clock on a CPU. Other devices are not timed.
    """

    def __init__(self, device: torch.device, running: bool = True):
        """running: False for one that tells no time and costs none."""
        self.device = device
        self._running = running
        # Events of a graph that is being captured belong to the graph and tell no time.
        self._stream = (torch.cuda.current_stream(device) if running and device.type == "cuda"
                        and not torch.cuda.is_current_stream_capturing() else None)
        self._start = self._now()
        self._stop: float | torch.cuda.Event | None = None

    def stop(self) -> Stopwatch:
        self._stop = self._now()
        return self

    def milliseconds(self) -> float | None:
        """None where it does not run or the device is not timed."""
        start, stop = self._start, self._stop
        if isinstance(start, float) and isinstance(stop, float):
            return 1000 * (stop - start)
        if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
            stop.synchronize()
            return start.elapsed_time(stop)
        return None

    def _now(self) -> float | torch.cuda.Event | None:
        if not self._running:
            return None
        if self.device.type == "cpu":
            return time.perf_counter()
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

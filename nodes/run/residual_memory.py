"""What the residuals of a run will take, counted before any is made, and the memory that they may take."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable

import torch

from .host_memory import SLOTS, Memory

SHARE = 0.5  # of the memory that is free while the model computes, on the GPU and in the host
ALLOWED = f"they may take {SHARE:.0%} of what is free on the GPU and in the host's memory"
_HOST = torch.device("cpu")


class ResidualMemory:
    """Memory for the residuals of a run. Not for several threads at once.

    An evaluation before the first refresh tells which calls will get one, and what the model leaves free. So it is
    known at the first refresh whether there is room for all. If not, there will be none at all: a run with residuals
    for some layers pays for all refreshes. Where no evaluation comes before, each call is asked for when it comes.

    counted: bytes that the residuals take, 0 where they were not counted.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self.clear()

    def clear(self) -> None:
        """End of a run."""
        self.counted = 0
        self._evaluation = 0
        self._sizes: dict[tuple[Hashable, ...], tuple[torch.device, int]] = {}
        self._limits: dict[torch.device, int] = {}
        self._host_limit: int | None = None  # not known yet
        self._largest = 0

    def count(self, keys: tuple[Hashable, ...], device: torch.device, size: int, evaluation: int) -> None:
        """Count a call that will get a residual of `size` bytes, in an evaluation before the first refresh."""
        if evaluation != self._evaluation:  # the last one before the refresh is the most like it
            self._evaluation, self._sizes = evaluation, {}
        self._sizes[keys] = device, size
        self.limit(device)

    def decide(self, ambiguous: Collection[Hashable], uses_host: Callable[[torch.device], bool]) -> str:
        """Decide on what was counted. Returns why there will be no residuals, empty where there may be some.

        ambiguous: keys of calls that get none.
        uses_host: whether residuals of a device can lie in the host's memory too.
        """
        sizes = defaultdict(list)
        for keys, (device, size) in self._sizes.items():
            if not any(key in ambiguous for key in keys):
                sizes[device].append(size)
        self.counted = sum(map(sum, sizes.values()))
        self._largest = max(map(max, sizes.values()), default=0)
        in_host = 0
        for device, each in sizes.items():
            slots = self.slots(0) if uses_host(device) else 0
            self._make_room(device, sum(each) + slots)
            room = self.limit(device) - slots
            for size in each:
                if size <= room:
                    room -= size
                elif slots and room >= 0:
                    in_host += size
                else:
                    return self._why_none(sizes, uses_host)
        return self._why_none(sizes, uses_host) if in_host and in_host > self.host_limit() else ""

    def _make_room(self, device: torch.device, size: int) -> None:
        """Have ComfyUI unload models that lie idle on a device, where so many bytes exceed the limit."""
        missing = int((size - self.limit(device)) / SHARE)
        if missing > 0:
            before = self._memory.free(device)
            self._memory.make_room(device, missing)
            self._limits[device] += max(0, int(SHARE * (self._memory.free(device) - before)))

    def _why_none(self, devices: Collection[torch.device], uses_host: Callable[[torch.device], bool]) -> str:
        allowed = sum(map(self.limit, devices)) + (self.host_limit() if any(map(uses_host, devices)) else 0)
        return f"they need {mib(self.counted)}, and {ALLOWED}, which is {mib(allowed)}"

    def limit(self, device: torch.device) -> int:
        """Bytes that residuals may take on a device. What is free is asked for once a run."""
        if device not in self._limits:
            self._limits[device] = int(SHARE * self._memory.free(device))
        return self._limits[device]

    def host_limit(self) -> int:
        """Bytes that they may take in the host's memory."""
        if self._host_limit is None:
            self._host_limit = int(SHARE * self._memory.free(_HOST))
        return self._host_limit

    def no_host(self) -> None:
        """The host's memory can't be had."""
        self._host_limit = 0

    def slots(self, size: int) -> int:
        """Bytes on a GPU through which residuals of the host's memory come, if one of `size` is among them."""
        return SLOTS * max(size, self._largest) if self.host_limit() else 0


def mib(size: int) -> str:
    return f"{size / 2 ** 20:.0f} MiB"

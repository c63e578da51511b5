"""Residuals in the host's memory, copied to a GPU one call ahead while it computes. The host waits for no copy."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import Residual

SLOTS = 2  # residuals that lie ready on the GPU: that of the call that computes, and the next one
_PAGE = 4096  # pinned memory is locked in whole pages, which must be of nobody else


@dataclass(frozen=True)
class Memory:
    """What a run asks of the memory that it shares with ComfyUI.

    free: bytes that a device, or the host, has left.
    pin: locks a tensor of the host, so that a GPU copies it while it computes; False where that can't be.
    unpin: ends that.
    make_room: has models that no run uses unloaded from a device, until so many bytes more are free there, if it can.
    """

    free: Callable[[torch.device], int] = lambda device: 0
    pin: Callable[[Tensor], bool] = lambda tensor: False
    unpin: Callable[[Tensor], Any] = lambda tensor: None
    make_room: Callable[[torch.device, int], Any] = lambda device, size: None


class Part(Protocol):
    """The batch entries `first` to `last` of a residual, on the GPU or in the host's memory. Compared by identity."""

    whole: Residual
    first: int
    last: int


class CopyStream:
    """Copies on a stream of their own. Events order them with the stream that computes."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, copies: Callable[[], None]) -> torch.Event:
        """Run `copies` after all that the computing stream has been given so far. Returns what to `wait` for."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies()
            return self._stream.record_event()

    def wait(self, copied: torch.Event) -> None:
        """Let the computing stream wait."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def uses(self, *tensors: Tensor) -> None:
        """Don't give the memory of these tensors, of the computing stream, to others before its copies are done."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def finish(self) -> None:
        """Let the host wait for all copies, before it takes back memory that they use."""
        try:
            self._stream.synchronize()
        except RuntimeError:  # an error of the device, which runs no copy any more
            pass


class Slot:
    """Memory on the GPU for one residual. parts: what it holds or is being filled with. copied: when it has that."""

    def __init__(self):
        self.memory: Tensor | None = None
        self.parts: Sequence[Part] = ()
        self.copied: Any = None


class HostTier:
    """The residuals of one GPU that have no room there. Not for several threads at once."""

    def __init__(self, device: torch.device, memory: Memory, stream: CopyStream):
        self._device = device
        self._memory = memory
        self._stream = stream
        self._slots = [Slot() for _ in range(SLOTS)]
        self._turn = 0  # the slot that the last call reads
        self._kept: dict[int, tuple[Residual, Tensor]] = {}  # by id of the residual, with its memory
        self._spare: defaultdict[int, list[Tensor]] = defaultdict(list)  # pinned memory by size
        self._pinned: list[tuple[Tensor, Tensor]] = []  # with the whole allocation

    @property
    def device_bytes(self) -> int:
        """Memory of the slots."""
        return sum(slot.memory.nbytes for slot in self._slots if slot.memory is not None)

    @property
    def host_bytes(self) -> int:
        """Pinned memory, unused one included."""
        return sum(pinned.nbytes for pinned, _ in self._pinned)

    def keep(self, residual: Residual) -> Residual | None:
        """Copy a residual of the GPU to the host; None where no memory could be pinned.

        It goes through a slot, so that its own memory is free at once.
        """
        shape = residual.quantised.shape
        memory = self._pin(_size(shape))
        if memory is None:
            return None
        kept, slot = _residual_in(memory, shape), self._next_slot(shape)
        staged = _residual_in(slot.memory, shape)
        if slot.copied is not None:
            self._stream.wait(slot.copied)
        _copy(staged, residual)
        slot.parts, slot.copied = (), self._stream.submit(lambda: _copy(kept, staged))
        self._kept[id(kept)] = kept, memory
        return kept

    def load(self, parts: Sequence[Part]) -> Residual:
        """These parts, one after another in the batch, on the GPU; they stay there until the next but one call."""
        if self._slots[self._turn].parts != parts:
            self._fetch(parts)
            self._turn = (self._turn + 1) % SLOTS
        slot = self._slots[self._turn]
        self._stream.wait(slot.copied)
        return _residual_in(slot.memory, _shape(parts))

    def prefetch(self, parts: Sequence[Part]) -> None:
        """Have the parts of the next call copied while this one computes, if there is memory for them."""
        try:
            self._fetch(parts)
        except torch.OutOfMemoryError:  # that call will try again
            pass

    def _fetch(self, parts: Sequence[Part]) -> None:
        """Have parts copied into the slot that the last call does not read, unless a slot holds them."""
        if any(slot.parts == parts for slot in self._slots):
            return
        shape = _shape(parts)
        slot = self._next_slot(shape)
        target, sources = _residual_in(slot.memory, shape), [_of(part) for part in parts]
        for source in sources:
            if source.scale.device == self._device:
                self._stream.uses(source.quantised, source.scale)

        def copies() -> None:
            start = 0
            for source in sources:
                stop = start + len(source.scale)
                _copy(target.batch(start, stop), source)
                start = stop

        slot.parts, slot.copied = parts, self._stream.submit(copies)

    def sweep(self, in_use: Collection[Residual]) -> None:
        """Let memory of residuals that are no longer in use serve others. Copies follow each other in any case."""
        used = {id(residual) for residual in in_use}
        for key in [key for key in self._kept if key not in used]:
            _, memory = self._kept.pop(key)
            self._spare[memory.nbytes].append(memory)

    def close(self) -> None:
        """Give all memory back."""
        self._stream.finish()
        for pinned, _ in self._pinned:
            self._memory.unpin(pinned)
        self._slots, self._kept, self._spare, self._pinned = [Slot() for _ in range(SLOTS)], {}, defaultdict(list), []

    def _next_slot(self, shape: torch.Size) -> Slot:
        """The slot that the last call does not read, with memory for a residual of `shape`."""
        slot, size = self._slots[(self._turn + 1) % SLOTS], _size(shape)
        if slot.memory is None or slot.memory.nbytes < size:
            slot.memory = slot.copied = None
            slot.parts = ()
            slot.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._stream.uses(slot.memory)
        return slot

    def _pin(self, size: int) -> Tensor | None:
        size = -(-size // _PAGE) * _PAGE
        if self._spare[size]:
            return self._spare[size].pop()
        try:
            whole = torch.empty(size + _PAGE, dtype=torch.uint8, device="cpu")
        except RuntimeError:  # the host's memory is full
            return None
        start = -whole.data_ptr() % _PAGE
        pinned = whole[start:start + size]
        if not self._memory.pin(pinned):
            return None
        self._pinned.append((pinned, whole))
        return pinned


def _of(part: Part) -> Residual:
    return part.whole.batch(part.first, part.last)


def _shape(parts: Sequence[Part]) -> torch.Size:
    """Of the quantised values of parts that follow each other in the batch."""
    first = parts[0].whole.quantised.shape
    return torch.Size((sum(part.last - part.first for part in parts), *first[1:]))


def _residual_in(memory: Tensor | None, shape: torch.Size) -> Residual:
    """A residual of attention of `shape` (B, H, Nq, D) in memory, uint8."""
    assert memory is not None
    start, stop = _start_of_scales(shape), _size(shape)
    return Residual(memory[:shape.numel()].view(torch.int8).view(shape),
                    memory[start:stop].view(torch.float32).view(shape[:3]))


def _size(shape: torch.Size) -> int:
    """Bytes of a residual of attention of `shape`, its scales behind the quantised values."""
    return _start_of_scales(shape) + 4 * shape[:3].numel()


def _start_of_scales(shape: torch.Size) -> int:
    return -(-shape.numel() // 4) * 4  # aligned for float32


def _copy(target: Residual, source: Residual) -> None:
    target.quantised.copy_(source.quantised, non_blocking=True)
    target.scale.copy_(source.scale, non_blocking=True)

"""Calls that were made before, launched again: what their form decides was decided the first time.

What a call launches depends on its form alone: shapes, strides, dtypes and alignment of its tensors, and its plain
arguments. So its launches are recorded, with the places where addresses of its tensors and of its memory stand. A later
call of the same form takes memory, puts its own addresses there and launches, which spares the host most of its work.
Importing this imports no Triton.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Residual, SpargeStats

_MOST = 256  # recordings; a new form beyond them makes room by dropping all
_MOST_BASES = 16  # addresses of memory that a recording keeps arguments for
_recordings: dict[tuple, Recording] = {}


class Later:
    """Stands among the arguments of a launch for the address of an input, which every call has anew."""

    __slots__ = ("number",)

    def __init__(self, number: int):
        """number: of the input."""
        self.number = number


class Launch(NamedTuple):
    """A recorded launch.

    bind: what launches on a stream with arguments, and the form of the given ones that it takes. arguments: those of
    the recorded call. inputs: (place, number of the input) of addresses among them. memory: (place, offset) of
    addresses in memory of the call. made: (place, offset, how to make it) of arguments that hold such an address.
    """

    bind: Callable[[list], tuple[Callable[[int, list], None], list]]
    arguments: list
    inputs: list[tuple[int, int]]
    memory: list[tuple[int, int]]
    made: list[tuple[int, int, Callable[[int], Any]]]

    def at(self, base: int) -> tuple[Callable[[int, list], None], list, list[tuple[int, int]]]:
        """The launch with the memory of the call at an address: start, arguments, inputs."""
        arguments = self.arguments.copy()
        for place, offset in self.memory:
            arguments[place] = base + offset
        for place, offset, make in self.made:
            arguments[place] = make(base + offset)
        for place, number in self.inputs:
            arguments[place] = Later(number)
        start, arguments = self.bind(arguments)
        return start, arguments, [(place, x.number) for place, x in enumerate(arguments) if type(x) is Later]


class Results(NamedTuple):
    """What a call returns, and the tensors therein, which its launches write."""

    returned: Any
    tensors: tuple[Tensor, ...]

    @classmethod
    def attention(cls, out: Tensor, stats: SpargeStats | None) -> Results:
        """Of `sparge_attention`, with or without statistics."""
        return cls(out, (out,)) if stats is None else cls((out, stats), (out, stats.kept, stats.pv_skipped))

    @classmethod
    def residual(cls, made: Residual) -> Results:
        """Of `attention_residual`."""
        return cls(made, (made.quantised, made.scale))


def room_for_attention(q: Tensor, heads: tuple[int, int] | None) -> Results:
    """Room for attention of q; heads: (B, H) of the statistics, None without them."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return Results.attention(out, None if heads is None else statistics(heads, q.device))


def room_for_residual(q: Tensor, shape: tuple[int, int, int, int]) -> Results:
    """Room for a residual of `shape` (B, H, Nq, D) on q's device."""
    return Results.residual(Residual.empty(shape, q.device))


class Recording:
    """The launches of one call."""

    def __init__(self, inputs: Sequence[Tensor | None], room: Callable[[Tensor], Results],
                 stream_of: Callable[[int], int | None]):
        """
        inputs: all tensors of the call, the results last.
        room: makes the results of a repetition, given its q.
        stream_of: the current stream of a device, None where a repetition can't be launched.
        """
        self.room = room
        addresses = [0 if x is None else x.data_ptr() for x in inputs]
        self._inputs = {address: number for number, address in enumerate(addresses) if address}
        self._memory: list[tuple[int, int, int]] = []  # (address, bytes, offset in the memory of a repetition)
        self._bytes = 0
        self._launches: list[Launch] = []
        self._stream_of = stream_of
        self._at: dict[int, list[tuple]] = {}  # the launches by address of the memory
        self._constants: dict[int, Tensor] = {}  # by address
        self._stream: int | None = None  # on which the constants were made
        # Two inputs in one place could lie in two places the next time.
        self.complete = len(self._inputs) == sum(map(bool, addresses))

    def allocated(self, address: int, size: int) -> None:
        """Memory that the call takes for itself."""
        self._memory.append((address, size, self._bytes))
        self._bytes += size

    def keeps(self, constant: Tensor) -> None:
        """A tensor that the form determines, and that was made on the current stream."""
        # What is made while a graph is captured belongs to the graph, and holds nothing yet.
        if constant.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            self.complete = False
            return
        self._constants[constant.data_ptr()] = constant
        self._stream = self._stream_of(constant.device.index)

    def launched(self, bind: Callable[[list], tuple[Callable[[int, list], None], list]] | None, arguments: list,
                 addresses: Sequence[tuple[int, int, Callable[[int], Any] | None]]) -> None:
        """A launch. bind: as in `Launch`, None where it can't be repeated. addresses: (place, address, how to make the
        argument)."""
        inputs, memory, made = [], [], []
        for place, address, make in addresses:
            number, offset = self._inputs.get(address), self._offset(address)
            if offset is not None and make is not None:
                made.append((place, offset, make))
            elif offset is not None:
                memory.append((place, offset))
            elif number is not None and make is None:
                inputs.append((place, number))
            elif address not in self._constants:
                self.complete = False  # a tensor that another call would not know
        if bind is None:
            self.complete = False
        else:
            self._launches.append(Launch(bind, arguments, inputs, memory, made))

    def stream(self, device: torch.device) -> int | None:
        """The current stream, None where it can't be launched there. Only the stream that made its constants is sure to
        have them, and a graph that is being captured would need them for longer than they live here."""
        stream = self._stream_of(device.index)
        if self._constants and (self._stream != stream or torch.cuda.is_current_stream_capturing()):
            return None
        return stream

    def __call__(self, inputs: Sequence[Tensor | None], device: torch.device, stream: int) -> None:
        """Launch for other inputs of the same form. Raises OutOfMemoryError before anything is launched."""
        memory = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        launches = self._launches_at(memory.data_ptr())
        addresses = [0 if x is None else x.data_ptr() for x in inputs]
        for start, arguments, places in launches:
            arguments = arguments.copy()
            for place, number in places:
                arguments[place] = addresses[number]
            start(stream, arguments)

    def _launches_at(self, base: int) -> list[tuple]:
        launches = self._at.get(base)
        if launches is None:
            launches = [launch.at(base) for launch in self._launches]
            if len(self._at) >= _MOST_BASES:
                self._at.clear()
            self._at[base] = launches
        return launches

    def _offset(self, address: int) -> int | None:
        for start, size, offset in self._memory:
            if start <= address < start + size:
                return offset + address - start
        return None


class _Thread(threading.local):
    recording: Recording | None = None
    off = False


_thread = _Thread()


def form_of(inputs: Sequence[Tensor | None], arguments: tuple) -> tuple | None:
    """The form of a call: what it must share with an earlier one to be a repetition of it. None where it never is."""
    device = getattr(inputs[0], "device", None)
    form = [arguments, device]
    for x in inputs:
        if x is None:
            form.append(None)
        elif type(x) is Tensor and x.device == device:
            form.append((x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0))
        else:  # of other types, the memory may be their own affair
            return None
    return tuple(form)


def repeat(form: tuple | None, inputs: Sequence[Tensor | None]) -> Any:
    """What a call returns whose form was recorded. None where it has to take the long way.

    inputs: q first.
    """
    try:
        recording = _recordings.get(form)
    except TypeError:  # an argument that can't be hashed; the checks will tell
        return None
    if recording is None or _thread.off:
        return None
    q, device = inputs[0], inputs[0].device
    try:
        with torch.cuda.device_of(q):
            stream = recording.stream(device)
            if stream is None:
                return None
            results = recording.room(q)
            recording((*inputs, *results.tensors), device, stream)
            return results.returned
    except torch.OutOfMemoryError:  # the long way takes the heads in groups
        return None


def statistics(shape: tuple[int, int], device: torch.device) -> SpargeStats:
    """Room for the statistics of a call of `shape` (B, H)."""
    kept = torch.empty(shape, dtype=torch.float32, device=device)
    return SpargeStats(kept, torch.empty_like(kept))


@contextmanager
def recorded(form: tuple | None, inputs: Sequence[Tensor | None], room: Callable[[Tensor], Results],
             stream_of: Callable[[int], int | None]) -> Iterator[None]:
    """Record the launches of this thread inside, unless something there fails. The arguments are those of `Recording`.
    """
    if form is None or _thread.off:
        yield
        return
    recording = _thread.recording = Recording(inputs, room, stream_of)
    try:
        yield
    finally:
        _thread.recording = None
    if recording.complete:
        if len(_recordings) >= _MOST:
            _recordings.clear()
        with suppress(TypeError):  # an argument that can't be hashed
            _recordings[form] = recording


def recording() -> Recording | None:
    """That of this thread."""
    return _thread.recording


@contextmanager
def off() -> Iterator[None]:
    """Inside, calls of this thread take the long way and are not recorded."""
    outer, _thread.off = _thread.off, True
    try:
        yield
    finally:
        _thread.off = outer


def forget() -> None:
    """Drop all recordings: something else than the form of a call has changed."""
    _recordings.clear()

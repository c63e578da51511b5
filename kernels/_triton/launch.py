"""What a call costs the host: memory taken in one piece a stage, and launches of kernels that are compiled already.

Triton's own launch looks at every argument anew to find the compiled kernel, which takes longer than short sequences
take the GPU. `launch` remembers it under what a kernel is specialised on: dtypes, alignment, absent arguments and
constants.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..failures import raise_failed
from ..triton_package import triton_version
from . import replay
from .direct import direct_launch

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:  # before Triton 3.4
    TensorDescriptor = None

_VERSION = triton_version() or (0, 0)
_RELAUNCHES = _VERSION >= (3, 6)
_KNOWN = (3, 6) <= _VERSION <= (3, 9)  # versions whose way from a compiled kernel to the driver is known to be the same
HAS_DESCRIPTORS = TensorDescriptor is not None
_ALIGNMENT = 256
_compiled: dict[tuple, object] = {}


class Region:
    """A tensor to be, in memory that it shares with others: an address and a shape, a torch tensor when asked."""

    __slots__ = ("memory", "offset", "shape", "dtype", "address")

    def __init__(self, memory: Tensor | None, base: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.memory, self.offset, self.shape, self.dtype, self.address = memory, offset, shape, dtype, base + offset

    def data_ptr(self) -> int:
        return self.address

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def view(self, dtype: torch.dtype) -> Region:
        """The same memory as elements of another type of the same size."""
        return Region(self.memory, self.address - self.offset, self.offset, self.shape, dtype)

    def tensor(self) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.memory[self.offset:self.offset + size].view(self.dtype).view(self.shape)


def allocate(device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype] | None) -> list[Region | None]:
    """Regions for (shape, dtype) pairs, None for None, in one allocation."""
    offsets, size = [], 0
    for item in wanted:
        offsets.append(size)
        if item is not None:
            size += -(-math.prod(item[0]) * item[1].itemsize // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    base = memory.data_ptr()
    if (recording := replay.recording()) is not None:
        recording.allocated(base, size)
    return [None if item is None else Region(memory, base, offset, *item) for item, offset in zip(wanted, offsets)]


def descriptor(x: Tensor | Region, rows: int, pitch: int, block: list[int]) -> TensorDescriptor:
    """x as a (rows, pitch) matrix that the tensor memory accelerator reads in blocks."""
    return TensorDescriptor(x, [rows, pitch], [pitch, 1], block)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *, inputs: dict, outputs: dict, sizes: dict,
           constants: dict, options: dict) -> None:
    """Launch a Triton kernel, its arguments by name: the names of the groups, one after another, are its signature.

    inputs, outputs: tensors, `Region`s, descriptors, None, and plain numbers. sizes: run-time integers. constants:
    tl.constexpr. options: num_warps and the like. Raises FastPathError where the kernel does not compile or start.
    """
    values, key, addresses = [], [kernel, device, *constants.values(), *options.values()], []
    for x in (*inputs.values(), *outputs.values()):
        kind = type(x)
        if kind is Region:
            key.append(x.dtype)
            x = x.address
            addresses.append((len(values), x, None))
        elif x is None:
            key.append(None)
        elif kind is TensorDescriptor:
            key.append((x.base.dtype, *x.block_shape))
            addresses.append((len(values), x.base.data_ptr(), x))
        elif kind is not int and kind is not float:
            address = x.data_ptr()
            key.append((x.dtype, address % 16 == 0))
            x = address
            addresses.append((len(values), x, None))
        values.append(x)
    key, grid = tuple(key), (*grid, 1, 1)[:3]
    compiled = _compiled.get(key)
    if compiled is None:
        arguments = {name: _materialise(x) for name, x in (inputs | outputs).items()} | sizes | constants
        _check_names(kernel, list(arguments))
        try:
            compiled = kernel[grid](**arguments, **options)
        except Exception as error:  # compilers and drivers fail in many ways
            raise_failed(f"kernel {_name_of(kernel)}", error)
        # Nothing is kept from the interpreter, and from versions whose compiled kernels take other arguments.
        if hasattr(compiled, "function") and _RELAUNCHES:
            _compiled[key] = compiled
        else:
            compiled = None
    else:
        compiled[grid](*values, *sizes.values(), *constants.values())
    if (recording := replay.recording()) is not None:
        _record(recording, None if compiled is None else _binder(compiled, grid),
                [*values, *sizes.values(), *constants.values()], addresses)


def _record(recording: replay.Recording, bind: Callable[[list], tuple] | None, arguments: list,
            addresses: list[tuple[int, int, TensorDescriptor | None]]) -> None:
    """Record a launch without what its descriptors hold: the memory of this call."""
    makers = []
    for place, address, described in addresses:
        if described is None:
            makers.append((place, address, None))
        else:
            arguments[place] = None
            makers.append((place, address, partial(_moved, _moved(described, 0))))
    recording.launched(bind, arguments, makers)


def current_stream(index: int) -> int | None:
    """The stream of a device that torch launches on, as Triton takes it. None where hooks of a profiler want to see
    every launch, which those of a recording would not tell them."""
    if _RELAUNCHES and (_does_anything(triton.knobs.runtime.launch_enter_hook)
                        or _does_anything(triton.knobs.runtime.launch_exit_hook)):
        return None
    return driver.active.get_current_stream(index)


def forget() -> None:
    """Drop what `launch` remembers."""
    _compiled.clear()
    replay.forget()


def _binder(compiled, grid: tuple[int, int, int]) -> Callable[[list], tuple[Callable[[int, list], None], list]]:
    """What `replay.Launch` binds a compiled kernel with: past Triton's launcher where that is known."""
    def bind(arguments: list) -> tuple[Callable[[int, list], None], list]:
        if _KNOWN:
            with suppress(Exception):  # another backend's launcher may look in any way
                return direct_launch(compiled.run, *grid, arguments=[compiled.function, compiled.packed_metadata,
                                                                     None, None, None, *arguments])
        return lambda stream, given: compiled[grid](*given, stream=stream), arguments

    return bind


def _does_anything(hook) -> object:
    """Something true where a hook of Triton's does: it is a function, or a chain that holds some."""
    return getattr(hook, "calls", hook)


def _moved(x: TensorDescriptor, address: int) -> TensorDescriptor:
    """A descriptor of the same matrix at another address."""
    moved = copy.copy(x)
    moved.base = Region(None, address, 0, x.base.shape, x.base.dtype)
    return moved


def _name_of(kernel) -> str:
    """The name of a jitted function."""
    return getattr(kernel, "fn", kernel).__name__


def _check_names(kernel, names: list[str]) -> None:
    """Hold the names of a launch against the kernel's signature: a remembered kernel takes arguments by position."""
    expected = list(kernel.arg_names)
    assert names == expected, f"{_name_of(kernel)} takes {expected}; got {names}"


def _materialise(x):
    if type(x) is Region:
        return x.tensor()
    if type(x) is TensorDescriptor and type(x.base) is Region:
        return TensorDescriptor(x.base.tensor(), x.shape, x.strides, x.block_shape)
    return x

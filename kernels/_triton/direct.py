"""Launches of compiled kernels without the Python of Triton's launcher.

That Python takes longer than the driver's part: it looks at every argument, encodes tensor descriptors and prepares for
what a kernel may lack. What it makes of a launch does not change while addresses do not. So it runs once with marks in
the places of what changes, and hands its result to a collector in place of the driver.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

from .replay import Later

_STREAM = Later(-1)


def direct_launch(run: Any, *before: Any, arguments: list) -> tuple[Callable[[int, list], None], list]:
    """What launches a kernel on a stream, and the arguments that it takes.

    run: Triton's launcher of the kernel, which is called with what is `before` the stream, the stream, and what follows
        it in `arguments`. Those that are `Later` are among the arguments that are returned.

    Raises, in any way, where the launcher is not as those of Triton 3.6 to 3.9 for NVIDIA and AMD: an object that hands
    the arguments to its `launch`, the driver's function or one that encodes descriptors for it, as its `launcher`.
    """
    if getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0):
        raise NotImplementedError("memory that belongs to one launch")
    native, caught = run.launch, []

    def catch(*given: Any) -> None:
        caught.extend(given)

    collector, names = catch, getattr(getattr(native, "__code__", None), "co_freevars", ())
    if "launcher" in names:
        cells = dict(zip(names, native.__closure__))
        collector = FunctionType(native.__code__, native.__globals__, closure=tuple(
            CellType(catch) if name == "launcher" else cell for name, cell in cells.items()))
        native = cells["launcher"].cell_contents
    collecting = copy.copy(run)
    collecting.launch = collector
    collecting(*before, _STREAM, *arguments)
    place = next(i for i, x in enumerate(caught) if x is _STREAM)
    first, rest = caught[:place], caught[place + 1:]
    if not isinstance(rest[-1], (list, tuple)):
        return lambda stream, given: native(*first, stream, *given), rest
    between, given = rest[:-1], list(rest[-1])  # from Triton 3.7 on for NVIDIA, those of the kernel in one piece
    return lambda stream, given: native(*first, stream, *between, given), given

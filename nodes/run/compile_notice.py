"""Says that kernels are being compiled, where that keeps a user waiting."""
from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

PATIENCE = 1.5  # seconds; kernels that were compiled before load in less
_started: set[Hashable] = set()


_silent = nullcontext()


def announced(kind: Hashable, say: Callable[[str], None]) -> AbstractContextManager:
    """Wrap a call that only hands work to a GPU. The first of a kind that takes longer than `PATIENCE` is compiling.

    say: shows the user a line; it may be called from another thread, in the context of this one.
    """
    if kind in _started:
        return _silent
    _started.add(kind)
    return _watched(say)


@contextmanager
def _watched(say: Callable[[str], None]) -> Iterator[None]:
    cache = os.environ.get("TRITON_CACHE_DIR")
    place = f" and kept in {cache}" if cache else ""
    message = f"compiling kernels for this model and GPU. This happens once; they are loaded from then on{place}"
    timer = threading.Timer(PATIENCE, contextvars.copy_context().run, (say, message))
    timer.daemon = True
    timer.start()
    begin = time.perf_counter()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.perf_counter() - begin
    if seconds > PATIENCE:
        say(f"kernels are ready after {seconds:.0f} s")

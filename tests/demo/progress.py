"""How far the sampling is, in one line of a terminal."""

import sys
import time
from typing import TextIO


class ProgressLine:
    """One line that is rewritten at every step. Where `stream` is no terminal, such as a file, it stays silent."""

    def __init__(self, clips: int, steps: int, stream: TextIO | None = None):
        self._clips, self._steps = clips, steps
        self._stream = sys.stderr if stream is None else stream
        self._clip = 0
        self._name = ""
        self._began = 0.0
        self._width = 0  # of the line that is there

    def begin(self, name: str) -> None:
        """The next clip, with the name of its attention."""
        self._clip += 1
        self._name, self._began = name, time.monotonic()
        self.step(0)

    def step(self, done: int) -> None:
        """So many steps of this clip have been taken."""
        self.show(f"clip {self._clip} of {self._clips}, {self._name}: {done} of {self._steps} steps, "
                  f"{time.monotonic() - self._began:.0f} s")

    def show(self, line: str) -> None:
        """Another line in its place; an empty one clears it."""
        if self._stream.isatty():
            self._stream.write(f"\r{line.ljust(self._width)}" if line else f"\r{' ' * self._width}\r")
            self._stream.flush()
            self._width = len(line)

"""The file of measured launch configurations: JSON that is checked field by field, and replaced as a whole."""
from __future__ import annotations

import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..types import BlockShape
from .config import AttendConfig

FORMAT = 1
PV_FORMATS = ("fp16", "int8")
_MOST_BYTES = 1 << 18
_MOST_ENTRIES = 500
_lock = threading.Lock()


class MeasuredFileError(ValueError):
    """A file of measured configurations that can't be used; the text says why."""


@dataclass(frozen=True)
class Launch:
    """What a configuration may change: warps, stages, and the most registers of a thread, None for the compiler's."""

    warps: int
    stages: int
    maxnreg: int | None

    @classmethod
    def of(cls, config: AttendConfig) -> Launch:
        return cls(config.warps, config.stages, config.maxnreg)


@dataclass(frozen=True)
class Measured:
    """A configuration that was faster than the table's.

    card: name of the GPU. triton: version, such as "3.6". padded_dim: head_dim as the kernels pad it. pv_format: number
    format of P·V. block_q, block_k, table: the table's entry that it was measured against. launch: the faster one.
    gain: the table's time in units of its own.
    """

    card: str
    triton: str
    padded_dim: int
    pv_format: str
    block_q: int
    block_k: int
    table: Launch
    launch: Launch
    gain: float

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.card, self.triton, self.padded_dim, self.pv_format

    def fits(self, entry: AttendConfig) -> bool:
        """Whether it was measured against this entry of the table."""
        return (BlockShape(self.block_q, self.block_k), self.table) == (entry.block, Launch.of(entry))


def read(path: Path) -> dict[tuple, Measured]:
    """The configurations of a file, by `Measured.key`. Raises MeasuredFileError and OSError."""
    if not path.exists():
        return {}
    if not path.is_file():  # reading a pipe would wait for ever
        raise MeasuredFileError("it must be a plain file")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise MeasuredFileError(f"it must have at most {_MOST_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise MeasuredFileError(f"it must be JSON: {problem}") from problem
    _check_fields("the file", content, {"format", "configurations"})
    _check_choice("format", content["format"], (FORMAT,))
    entries = content["configurations"]
    if type(entries) is not list or len(entries) > _MOST_ENTRIES:
        raise MeasuredFileError(f"configurations must be a list of at most {_MOST_ENTRIES}")
    found = map(_checked, entries)
    return {entry.key: entry for entry in found}


def write(path: Path, entries: Iterable[Measured]) -> None:
    """Replace a file at once: a reader sees the old one or the new one. Raises OSError."""
    text = json.dumps({"format": FORMAT, "configurations": [asdict(entry) for entry in entries]}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def change(path: Path, key: tuple, entry: Measured | None) -> None:
    """Put an entry into a file, or take that of the key out. What can't be read is replaced. Raises OSError."""
    with _lock:
        try:
            entries = read(path)
        except MeasuredFileError:
            entries = {}
        if entry is None and key not in entries:
            return
        entries.pop(key, None)
        write(path, [*entries.values(), *([] if entry is None else [entry])])


def _check(name: str, value: Any, rule: Callable[[Any], object], wanted: str) -> None:
    if not rule(value):
        raise MeasuredFileError(f"{name} must be {wanted}; got {value!r:.80}")


def _check_fields(name: str, value: Any, names: set[str]) -> None:
    _check(name, value, lambda x: type(x) is dict and x.keys() == names, f"an object of {', '.join(sorted(names))}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    _check(name, value, lambda x: type(x) is type(choices[0]) and x in choices, f"one of {choices}")


def _checked(entry: Any) -> Measured:
    _check_fields("a configuration", entry, {field.name for field in fields(Measured)})
    _check("card", entry["card"], lambda x: type(x) is str and 0 < len(x) <= 200 and x.isprintable(), "a name")
    _check("triton", entry["triton"], lambda x: type(x) is str and re.fullmatch(r"[0-9]{1,3}[.][0-9]{1,3}", x),
           "a version such as 3.6")
    _check_choice("padded_dim", entry["padded_dim"], (32, 64, 128, 256))
    _check_choice("pv_format", entry["pv_format"], PV_FORMATS)
    for name in ("block_q", "block_k"):
        _check_choice(name, entry[name], (16, 32, 64, 128, 256))
    _check("gain", entry["gain"], lambda x: type(x) is float and math.isfinite(x) and 1 < x < 100, "a ratio above 1")
    return Measured(**{**entry, **{name: _launch(name, entry[name]) for name in ("table", "launch")}})


def _launch(name: str, value: Any) -> Launch:
    _check_fields(name, value, {field.name for field in fields(Launch)})
    _check_choice(f"{name}.warps", value["warps"], (1, 2, 4, 8, 16))
    _check_choice(f"{name}.stages", value["stages"], tuple(range(1, 9)))
    _check(f"{name}.maxnreg", value["maxnreg"], lambda x: x is None or (type(x) is int and 32 <= x <= 255),
           "null or 32 to 255")
    return Launch(**value)

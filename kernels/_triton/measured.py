"""Which launch configuration a call takes: the table's, or one that was measured to be faster on this very card.

`kernels/benchmark` measures them. Importing this imports no Triton.
"""
from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..capability import card_name
from ..triton_package import triton_version
from . import measured_file, replay
from .config import AttendConfig
from .measured_file import Launch, Measured, MeasuredFileError

_log = logging.getLogger("comfyui_spargeattn")
_lock = threading.Lock()
_known: dict[tuple, Measured] = {}  # by Measured.key
# (device, padded head_dim, format of P·V) → the table's entry and what calls take in its place
_taken: dict[tuple[torch.device, int, str], tuple[AttendConfig, AttendConfig]] = {}
_given_up: set[torch.device] = set()
_said: set[str] = set()


@dataclass
class Trial:
    """What the calls of one thread take while a benchmark tries configurations.

    config: what they take, None for the table's. entry, padded_dim, pv_format: of the last call.
    """

    config: AttendConfig | None = None
    entry: AttendConfig | None = None
    padded_dim: int = 0
    pv_format: str = ""


class _Thread(threading.local):
    trial: Trial | None = None


_thread = _Thread()


def configuration(device: torch.device, entry: AttendConfig, padded_dim: int, pv_format: str) -> AttendConfig:
    """The launch configuration of a call on `device`, for which the table has `entry`.

    pv_format: of P·V, one of measured_file.PV_FORMATS.
    """
    trial = _thread.trial
    if trial is not None:
        trial.entry, trial.padded_dim, trial.pv_format = entry, padded_dim, pv_format
        return trial.config or entry
    if not _known:
        return entry
    key = device, padded_dim, pv_format
    taken = _taken.get(key)
    if taken is None or taken[0] is not entry:
        with _lock:
            taken = _taken[key] = entry, _choose(device, entry, padded_dim, pv_format)
    return taken[1]


def load_configurations(path: str | Path) -> None:
    """Take the launch configurations that were measured on this card from a file, from now on.

    `python -m comfyui_spargeattn.kernels.benchmark --keep FILE` writes it. A file that can't be used is ignored, with a
    line in the log, and so is what belongs to another card or another Triton. No file is no configurations.
    """
    try:
        found = measured_file.read(Path(path))
    except (MeasuredFileError, OSError) as problem:
        _log.warning("SpargeAttn: the launch configurations in %s are ignored: %s", path, problem)
        found = {}
    with _lock:
        _use(found)


def keep(path: Path | None, key: tuple, entry: Measured | None) -> None:
    """Take an entry from now on, in this process and through the file in later ones; with None the table's again.

    key: `Measured.key`. path: None for this process alone. Raises OSError where the file can't be written.
    """
    with _lock:
        known = {other: value for other, value in _known.items() if other != key}
        _use(known if entry is None else {**known, key: entry})
    if path is not None:
        measured_file.change(path, key, entry)


def give_up(device: torch.device) -> bool:
    """Take the table's configurations on a device until the next ones are measured. Whether it took any others."""
    with _lock:
        took = any(key[0] == device and entry is not config for key, (entry, config) in _taken.items())
        if took:
            _given_up.add(device)
            _taken.clear()
            replay.forget()
    if took:
        _log.warning("SpargeAttn: a launch configuration that was measured on this card fails; the pack's own is taken "
                     "in its place. Run Benchmark SpargeAttn again")
    return took


@contextmanager
def trial() -> Iterator[Trial]:
    """Inside, calls of this thread take `Trial.config`."""
    outer, _thread.trial = _thread.trial, Trial()
    try:
        with replay.off():
            yield _thread.trial
    finally:
        _thread.trial = outer


def triton_name() -> str:
    """Major and minor version of Triton, such as "3.6"."""
    return "{}.{}".format(*(triton_version() or (0, 0)))


def _use(known: dict[tuple, Measured]) -> None:
    global _known
    _known = known
    _taken.clear()
    _given_up.clear()
    _said.clear()
    replay.forget()


def _choose(device: torch.device, entry: AttendConfig, padded_dim: int, pv_format: str) -> AttendConfig:
    if device in _given_up:
        return entry
    card, triton = card_name(device), triton_name()
    if not any(key[:2] == (card, triton) for key in _known):
        _say(f"no launch configuration was measured on {card} with Triton {triton}: those of others are ignored")
        return entry
    found = _known.get((card, triton, padded_dim, pv_format))
    if found is None:
        return entry
    if not found.fits(entry):
        _say("launch configurations that were measured with another version of this pack are ignored: run Benchmark "
             "SpargeAttn again")
        return entry
    return put(entry, found.launch)


def put(entry: AttendConfig, launch: Launch) -> AttendConfig:
    """An entry of the table with other launch options."""
    return replace(entry, warps=launch.warps, stages=launch.stages, maxnreg=launch.maxnreg)


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.info("SpargeAttn: %s", text)

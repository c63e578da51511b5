"""What sparse attention lacked of dense attention at the last refresh, for every layer and condition of a run."""
from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from ...kernels import Residual
from ..call.arguments import AttentionCall
from ..call.plan import CallSite

SHARE = 0.5  # of the memory that is free when a run's first residual is made


class _Entry:
    """One condition's part of a residual: batch entries `first` to `last` of `whole`, made in an evaluation."""

    __slots__ = ("whole", "first", "last", "evaluation")

    def __init__(self, whole: Residual, first: int, last: int, evaluation: int):
        self.whole, self.first, self.last, self.evaluation = whole, first, last, evaluation


class ResidualStore:
    """The residuals of a run. Threads of several GPUs share it.

    A residual is used by the layer, condition, context window and shape that it was made for. Conditions may be
    evaluated together at a refresh and one by one later, or the other way round. What comes twice in one evaluation
    under one key, such as the tiles of a large picture, can't be told apart: it is not kept for the rest of the run.
    """

    def __init__(self, free_bytes: Callable[[torch.device], int]):
        """free_bytes: memory that a device has left."""
        self._free_bytes = free_bytes
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries: dict[Hashable, _Entry] = {}
            self._ambiguous: set[Hashable] = set()
            self._limits: dict[torch.device, int] = {}
            self.refused = 0  # residuals for which there was no memory
            self.used = 0  # sparse calls to which one was added
            self.most_bytes = 0

    def keys(self, call: AttentionCall, site: CallSite) -> list[Hashable] | None:
        """One key for each condition of a call, None where it can't be recognised in other evaluations."""
        options = call.transformer_options
        conditions, window = options.get("uuids"), options.get("context_window")
        if site.layer is None or site.doubt or not conditions or call.batch % len(conditions):
            return None
        frames = () if window is None else getattr(window, "index_list", None)
        if frames is None:
            return None
        replaced = frozenset((options.get("patches_replace") or {}).get("dit") or ())
        shape = call.batch // len(conditions), call.heads[0], call.q_tokens, call.q.shape[-1]
        return [(site.layer, condition, tuple(frames), replaced, call.q.device, shape) for condition in conditions]

    def admits(self, call: AttentionCall, keys: Sequence[Hashable], evaluation: int) -> bool:
        """Whether there is use and memory for the residual of a call."""
        device, rows = call.q.device, call.batch * call.heads[0] * call.q_tokens
        free = self._free_bytes(device) if device not in self._limits else 0
        with self._lock:
            for key in keys:
                if (kept := self._entries.get(key)) is not None and kept.evaluation == evaluation:
                    self._ambiguous.add(key)
            if len(set(keys)) < len(keys):
                self._ambiguous.update(keys)
            for key in self._ambiguous.intersection(keys):
                self._entries.pop(key, None)
            if not self._ambiguous.isdisjoint(keys):
                return False
            limit = self._limits.setdefault(device, int(SHARE * free))
            if self._bytes(device, without=keys) + rows * (call.q.shape[-1] + 4) <= limit:
                return True
            self.refused += 1
        self.drop(keys)
        return False

    def drop(self, keys: Sequence[Hashable]) -> None:
        """Drop an earlier residual that could not be made anew."""
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)

    def put(self, keys: Sequence[Hashable], residual: Residual, evaluation: int) -> None:
        """Keep a residual (B, …) for conditions that follow each other in the batch."""
        each = len(residual.scale) // len(keys)
        with self._lock:
            for i, key in enumerate(keys):
                self._entries[key] = _Entry(residual, i * each, (i + 1) * each, evaluation)
            self.most_bytes = max(self.most_bytes, self._bytes(residual.scale.device))

    def get(self, keys: Sequence[Hashable] | None) -> Residual | None:
        """The residual of conditions that follow each other in a batch, None where one of them has none."""
        with self._lock:
            found = [entry for key in keys or () if (entry := self._entries.get(key)) is not None]
            if not keys or len(found) < len(keys):
                return None
            self.used += 1
        first, last = found[0], found[-1]
        if all(a.whole is b.whole and a.last == b.first for a, b in zip(found, found[1:])):
            return first.whole.batch(first.first, last.last)
        parts = [entry.whole.batch(entry.first, entry.last) for entry in found]
        return Residual(torch.cat([part.quantised for part in parts]), torch.cat([part.scale for part in parts]))

    def _bytes(self, device: torch.device, without: Sequence[Hashable] = ()) -> int:
        """Memory that is taken on a device, but for the residuals of some keys."""
        wholes = {id(entry.whole): entry.whole for key, entry in self._entries.items() if key not in without}
        return sum(whole.bytes for whole in wholes.values() if whole.scale.device == device)

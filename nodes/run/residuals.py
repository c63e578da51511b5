"""What sparse attention lacked of dense attention at the last refresh, for every layer and condition of a run."""
from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

import torch

from ...kernels import Residual
from ..call.arguments import AttentionCall
from ..call.plan import CallSite
from .host_memory import SLOTS, CopyStream, HostTier, Memory

SHARE = 0.5  # of the memory that is free when a run's first residual is made, on the GPU and in the host
NO_MEMORY = f"they may take {SHARE:.0%} of what was free on the GPU and in the host's memory"
_HOST = torch.device("cpu")


class _Entry:
    """One condition's part of a residual: batch entries `first` to `last` of `whole`, made in an evaluation.

    on_host: whether it lies in the host's memory, not on the GPU that uses it.
    """

    __slots__ = ("whole", "first", "last", "evaluation", "on_host")

    def __init__(self, whole: Residual, first: int, last: int, evaluation: int, on_host: bool):
        self.whole, self.first, self.last, self.evaluation, self.on_host = whole, first, last, evaluation, on_host


class ResidualStore:
    """The residuals of a run. Threads of several GPUs share it.

    A residual is used by the layer, condition, context window and shape that it was made for. Conditions may be
    evaluated together at a refresh and one by one later, or the other way round. What comes twice in one evaluation
    under one key, such as the tiles of a large picture, can't be told apart: it is not kept for the rest of the run.

    Residuals lie on the GPU as long as they take up to `SHARE` of its memory. The others lie in pinned memory of the
    host, and are fetched while the call before computes, in the order in which the calls came in the evaluation before.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self._lock = threading.Lock()
        self._tiers: dict[torch.device, HostTier] = {}
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            for tier in self._tiers.values():
                tier.close()
            self._tiers = {}
            self._entries: dict[Hashable, _Entry] = {}
            self._ambiguous: set[Hashable] = set()
            self._limits: dict[torch.device, int] = {}
            self._host_limit: int | None = None  # not known yet
            self._last: dict[torch.device, tuple[Hashable, ...]] = {}  # what the last call asked for
            self._next: dict[tuple[Hashable, ...], tuple[Hashable, ...]] = {}  # what came after that before
            self.refused = 0  # residuals for which there was no memory
            self.used = 0  # sparse calls to which one was added
            self.most_bytes = 0
            self.most_host_bytes = 0

    @staticmethod
    def keys(call: AttentionCall, site: CallSite) -> list[Hashable] | None:
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
        device, size = call.q.device, call.batch * call.heads[0] * call.q_tokens * (call.q.shape[-1] + 4)
        free = 0 if device in self._limits else self._memory.free(device)
        with self._lock:
            self._limits.setdefault(device, int(SHARE * free))
            for key in keys:
                if (kept := self._entries.get(key)) is not None and kept.evaluation == evaluation:
                    self._ambiguous.add(key)
            if len(set(keys)) < len(keys):
                self._ambiguous.update(keys)
            for key in self._ambiguous.intersection(keys):
                self._entries.pop(key, None)
            if not self._ambiguous.isdisjoint(keys):
                return False
            if self._place(device, size, keys):
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
        each, device = len(residual.scale) // len(keys), residual.scale.device
        with self._lock:
            on_host = self._place(device, residual.bytes, keys) == "host"
            if on_host:
                for key in keys:
                    self._entries.pop(key, None)
                tier = self._tiers[device]
                tier.sweep([entry.whole for entry in self._entries.values()])
                kept = tier.keep(residual)
                if kept is None:
                    self._host_limit = 0  # it would fail again
                    self.refused += 1
                    return
                residual = kept
            for i, key in enumerate(keys):
                self._entries[key] = _Entry(residual, i * each, (i + 1) * each, evaluation, on_host)
            self._came(device, tuple(keys))
            self.most_bytes = max(self.most_bytes, self._bytes(device))
            self.most_host_bytes = max(self.most_host_bytes,
                                       sum(tier.host_bytes for tier in self._tiers.values()))

    def get(self, keys: Sequence[Hashable] | None, device: torch.device) -> Residual | None:
        """The residual of conditions that follow each other in a batch, for a sparse call to add, None where one of
        them has none."""
        if not keys:
            return None
        residual = self.earlier(keys, device)
        with self._lock:
            self.used += residual is not None
            self._came(device, tuple(keys))
            tier, following = self._tiers.get(device), self._found(self._next.get(tuple(keys), ()))
        if tier is not None and any(entry.on_host for entry in following):
            tier.prefetch(following)
        return residual

    def earlier(self, keys: Sequence[Hashable], device: torch.device) -> Residual | None:
        """The same for a refresh to start from."""
        with self._lock:
            found, tier = self._found(keys), self._tiers.get(device)
        return self._together(found, tier) if found else None

    @staticmethod
    def _together(found: tuple[_Entry, ...], tier: HostTier | None) -> Residual:
        if tier is not None and any(entry.on_host for entry in found):
            return tier.load(found)
        first, last = found[0], found[-1]
        if all(a.whole is b.whole and a.last == b.first for a, b in zip(found, found[1:])):
            return first.whole.batch(first.first, last.last)
        parts = [entry.whole.batch(entry.first, entry.last) for entry in found]
        return Residual(torch.cat([part.quantised for part in parts]), torch.cat([part.scale for part in parts]))

    def _found(self, keys: Sequence[Hashable]) -> tuple[_Entry, ...]:
        """The entries of keys, none where one of them has none."""
        found = [entry for key in keys if (entry := self._entries.get(key)) is not None]
        return tuple(found) if len(found) == len(keys) else ()

    def _came(self, device: torch.device, keys: tuple[Hashable, ...]) -> None:
        if device in self._last:
            self._next[self._last[device]] = keys
        self._last[device] = keys

    def _place(self, device: torch.device, size: int, keys: Sequence[Hashable]) -> str:
        """Where there is room for a residual in place of those of some keys: "device", "host", or "" for nowhere."""
        used, limit, tier = self._bytes(device, without=keys), self._limits[device], self._tier(device)
        if tier is None:
            return "device" if used + size <= limit else ""
        if self._host_limit is None:
            self._host_limit = int(SHARE * self._memory.free(_HOST))
        # Those in the host's memory come through slots, which need room as well.
        used += max(tier.device_bytes, SLOTS * size if self._host_limit else 0)
        if used + size <= limit:
            return "device"
        return "host" if used <= limit and self._bytes(None, without=keys) + size <= self._host_limit else ""

    def _tier(self, device: torch.device) -> HostTier | None:
        """The residuals of a GPU that lie in the host's memory, None where it can't be copied from meanwhile."""
        if device not in self._tiers and device.type == "cuda":
            self._tiers[device] = HostTier(device, self._memory, CopyStream(device))
        return self._tiers.get(device)

    def _bytes(self, device: torch.device | None, without: Sequence[Hashable] = ()) -> int:
        """Memory that is taken on a device, of the host for None, but for the residuals of some keys."""
        entries = [entry for key, entry in self._entries.items() if key not in without
                   and entry.on_host == (device is None)]
        wholes = {id(entry.whole): entry.whole for entry in entries}
        return sum(whole.bytes for whole in wholes.values() if device is None or whole.scale.device == device)

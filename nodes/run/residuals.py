"""What sparse attention lacked of dense attention at the last refresh, for every layer and condition of a run."""
from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

import torch

from ...kernels import Residual
from ..call.arguments import AttentionCall
from ..call.plan import CallSite
from .host_memory import CopyStream, HostTier, Memory
from .residual_entries import Entry, ResidualEntries
from .residual_memory import ResidualMemory


class ResidualStore:
    """The residuals of a run. Threads of several GPUs share it.

    A residual is used by the layer, condition, context window and shape that it was made for. Conditions may be
    evaluated together at a refresh and one by one later, or the other way round. What comes twice in one evaluation
    under one key, such as the tiles of a large picture, can't be told apart: it is not kept for the rest of the run.

    Which residual a call gets is decided on the host, before its thresholds are chosen. A test on the device, whether Q
    agrees with that of the refresh, would come too late: with thresholds that count on a residual, a call without one
    is as far from dense attention as with a foreign one. Nor does pooled Q tell, most of which is the position of the
    tokens (tests/bench/README.md, "Refreshes").

    Residuals lie on the GPU as long as they take up to a share of its memory. The others lie in pinned memory of the
    host, and are fetched while the call before computes, in the order in which the calls came in the evaluation before.

    room: the memory that they may take.
    refused: residuals for which there was none.
    used: sparse calls to which one was added.
    most_bytes, most_host_bytes: memory that they took at most, on all GPUs and in the host.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self.room = ResidualMemory(memory)
        self._lock = threading.Lock()
        self._tiers: dict[torch.device, HostTier] = {}
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            for tier in self._tiers.values():
                tier.close()
            self._tiers = {}
            self._entries = ResidualEntries()
            self._seen: dict[Hashable, int] = {}  # the evaluation in which a key came last
            self._ambiguous: set[Hashable] = set()
            self.room.clear()
            self._last: dict[torch.device, tuple[Hashable, ...]] = {}  # what the last call asked for
            self._next: dict[tuple[Hashable, ...], tuple[Hashable, ...]] = {}  # what came after that before
            self.refused = 0
            self.used = 0
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
        replaced = frozenset((kind, where) for kind, patches in (options.get("patches_replace") or {}).items()
                             for where in patches)
        shape = call.batch // len(conditions), call.heads[0], call.q_tokens, call.q.shape[-1]
        return [(site.layer, condition, tuple(frames), replaced, call.q.device, shape) for condition in conditions]

    def count(self, call: AttentionCall, site: CallSite, evaluation: int) -> None:
        """Count the residual that a call will get, in an evaluation before the first refresh."""
        keys = self.keys(call, site)
        if keys is not None:
            with self._lock:
                self._note(keys, evaluation)
                self.room.count(tuple(keys), call.q.device, _size(call), evaluation)

    def decide(self) -> str:
        """Decide about the memory that was counted, before the first refresh. Returns why there will be none, empty
        where there may be some."""
        with self._lock:
            return self.room.decide(self._ambiguous, lambda device: self._tier(device) is not None)

    def admits(self, call: AttentionCall, keys: Sequence[Hashable], evaluation: int) -> bool:
        """Whether there is use and memory for the residual of a call."""
        with self._lock:
            if not self._note(keys, evaluation):
                return False
            for _ in range(2):
                if self._place(call.q.device, _size(call), keys):
                    return True
                self._entries.keep_only(evaluation)  # what was not made anew yet makes way
            self.refused += 1
        self.drop(keys)
        return False

    def _note(self, keys: Sequence[Hashable], evaluation: int) -> bool:
        """Note that a call came. Returns whether it can be told from all others of its evaluation and those before."""
        for key in keys:
            if self._seen.get(key) == evaluation:
                self._ambiguous.add(key)
                self._entries.drop((key,))
            self._seen[key] = evaluation
        return self._ambiguous.isdisjoint(keys)

    def drop(self, keys: Sequence[Hashable]) -> None:
        """Drop an earlier residual that could not be made anew."""
        with self._lock:
            self._entries.drop(keys)

    def end_refresh(self, evaluation: int) -> None:
        """Drop what an evaluation did not make anew, such as of context windows that have moved on."""
        with self._lock:
            self._entries.keep_only(evaluation)

    def put(self, keys: Sequence[Hashable], residual: Residual, evaluation: int) -> None:
        """Keep a residual (B, …) for conditions that follow each other in the batch."""
        each, device = len(residual.scale) // len(keys), residual.scale.device
        with self._lock:
            on_host = self._place(device, residual.bytes, keys) == "host"
            if on_host:
                self._entries.drop(keys)
                tier = self._tiers[device]
                tier.sweep([entry.whole for entry in self._entries])
                kept = tier.keep(residual)
                if kept is None:
                    self.room.no_host()  # it would fail again
                    self.refused += 1
                    return
                residual = kept
            for i, key in enumerate(keys):
                self._entries.put(key, Entry(residual, i * each, (i + 1) * each, evaluation, on_host))
            self._came(device, tuple(keys))
            self.most_bytes = max(self.most_bytes, sum(map(self._entries.bytes, self._last)))
            self.most_host_bytes = max(self.most_host_bytes,
                                       sum(tier.host_bytes for tier in self._tiers.values()))

    def get(self, keys: Sequence[Hashable] | None, device: torch.device, evaluation: int) -> Residual | None:
        """The residual of conditions that follow each other in a batch, for a sparse call to add, None where one of
        them has none."""
        if not keys:
            return None
        with self._lock:
            self._note(keys, evaluation)
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
    def _together(found: tuple[Entry, ...], tier: HostTier | None) -> Residual:
        if tier is not None and any(entry.on_host for entry in found):
            return tier.load(found)
        first, last = found[0], found[-1]
        if all(a.whole is b.whole and a.last == b.first for a, b in zip(found, found[1:])):
            return first.whole.batch(first.first, last.last)
        parts = [entry.whole.batch(entry.first, entry.last) for entry in found]
        return Residual(torch.cat([part.quantised for part in parts]), torch.cat([part.scale for part in parts]))

    def _found(self, keys: Sequence[Hashable]) -> tuple[Entry, ...]:
        """The entries of keys, none where one of them has none."""
        found = self._entries.of(keys)
        return tuple(found) if len(found) == len(keys) else ()

    def _came(self, device: torch.device, keys: tuple[Hashable, ...]) -> None:
        if device in self._last:
            self._next[self._last[device]] = keys
        self._last[device] = keys

    def _place(self, device: torch.device, size: int, keys: Sequence[Hashable]) -> str:
        """Where there is room for a residual in place of those of some keys: "device", "host", or "" for nowhere."""
        taken, limit, tier = self._entries.bytes, self.room.limit(device), self._tier(device)
        used = taken(device, without=keys)
        if tier is None:
            return "device" if used + size <= limit else ""
        # Those in the host's memory come through slots, which need room as well.
        used += max(tier.device_bytes, self.room.slots(size))
        if used + size <= limit:
            return "device"
        return "host" if used <= limit and taken(None, without=keys) + size <= self.room.host_limit() else ""

    def _tier(self, device: torch.device) -> HostTier | None:
        """The residuals of a GPU that lie in the host's memory, None where it can't be copied from meanwhile."""
        if device not in self._tiers and device.type == "cuda":
            self._tiers[device] = HostTier(device, self._memory, CopyStream(device))
        return self._tiers.get(device)


def _size(call: AttentionCall) -> int:
    """Bytes of the residual of a call."""
    return call.batch * call.heads[0] * call.q_tokens * (call.q.shape[-1] + 4)

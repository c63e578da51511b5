"""The residuals of a run by layer and condition, with the memory that they take."""
from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ...kernels import Residual


@dataclass(eq=False)
class Entry:
    """One condition's part of a residual: batch entries `first` to `last` of `whole`, made in an evaluation. Compared
    by identity.

    on_host: whether it lies in the host's memory, not on the GPU that uses it.
    """

    whole: Residual
    first: int
    last: int
    evaluation: int
    on_host: bool


class ResidualEntries:
    """Entries by key. Not for several threads at once.

    Conditions that were evaluated together share a residual, which takes its memory until the last of them is gone. The
    sums are kept, because every call of a refresh asks for them.
    """

    def __init__(self):
        self._entries: dict[Hashable, Entry] = {}
        self._sharing: Counter[int] = Counter()  # entries by id of their residual
        self._bytes: Counter[torch.device | None] = Counter()  # by device, None for the host

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def of(self, keys: Iterable[Hashable]) -> list[Entry]:
        """Those of keys that have one, in their order."""
        return [entry for key in keys if (entry := self._entries.get(key)) is not None]

    def put(self, key: Hashable, entry: Entry) -> None:
        self.drop((key,))
        self._entries[key] = entry
        shared = id(entry.whole)
        if not self._sharing[shared]:
            self._bytes[_where(entry)] += entry.whole.bytes
        self._sharing[shared] += 1

    def drop(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is None:
                continue
            shared = id(entry.whole)
            self._sharing[shared] -= 1
            if not self._sharing[shared]:
                del self._sharing[shared]
                self._bytes[_where(entry)] -= entry.whole.bytes

    def keep_only(self, evaluation: int) -> None:
        """Drop those that were made in other evaluations."""
        self.drop([key for key, entry in self._entries.items() if entry.evaluation != evaluation])

    def bytes(self, device: torch.device | None, without: Collection[Hashable] = ()) -> int:
        """Memory that they take on a device, in the host for None, if those of some keys were gone."""
        there = [entry for entry in self.of(without) if _where(entry) == device]
        going = Counter(id(entry.whole) for entry in there)
        wholes = {id(entry.whole): entry.whole for entry in there}
        return self._bytes[device] - sum(whole.bytes for shared, whole in wholes.items()
                                         if going[shared] == self._sharing[shared])


def _where(entry: Entry) -> torch.device | None:
    return None if entry.on_host else entry.whole.scale.device

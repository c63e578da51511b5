"""The attention calls of refreshes, kept for a search that measures later calls with the residuals they leave."""
from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from ..call.arguments import AttentionCall
from ..call.measure import RefreshedCall
from ..call.plan import CallSite
from .residuals import ResidualStore

SHARE = 0.5  # of the ordinary memory that is free at a refresh
_HOST = torch.device("cpu")
_UNKNOWN = "the call of the last refresh can't be told from others"
_NO_MEMORY = ("ordinary memory holds the refreshed calls of some layers only, which take turns; more sampled_steps "
              "reach more of them")


class RefreshedCalls:
    """The calls of the last refresh, and of the one before where residuals are extrapolated from it. Threads of several
    GPUs share it.

    A residual depends on the setting that it is made with, so a search needs q, k, v and the dense result themselves.
    They lie in ordinary memory: four tensors a layer and refresh, which are 400 MB a layer and condition of Wan 1.3B at
    32760 tokens. Where they don't all fit, calls of the refresh before give way, and the search takes residuals of
    those layers as they are. Where that is not enough, the layers that the search has not measured yet come first at
    the next refresh.
    """

    def __init__(self, free_bytes: Callable[[torch.device], int]):
        """free_bytes: memory that a device has left."""
        self._free_bytes = free_bytes
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """End of a run."""
        with self._lock:
            self._kept: dict[Hashable, RefreshedCall] = {}
            self._earlier: dict[Hashable, RefreshedCall] = {}
            self._lead = 0.0
            self._ambiguous: set[Hashable] = set()  # what came twice in one evaluation
            self._came: set[Hashable] = set()  # at the last refresh
            self._waiting: set[Hashable] = set()  # for its turn to be measured
            self._short = False  # whether memory is
            self._turn: frozenset[Hashable] = frozenset()  # where memory is short: what may be kept at this refresh
            self._room = 0

    def begin(self, lead: float = 0.0) -> None:
        """Start a refresh. lead: how far its residuals are extrapolated; zero drops the calls of the last one."""
        with self._lock:
            self._earlier, self._kept, self._lead = self._kept if lead else {}, {}, lead
            self._waiting = self._waiting & self._came or self._came
            self._came = set()
            self._turn = frozenset(self._waiting if self._short else ())
            taken = sum(map(_bytes, self._earlier.values()))
            self._room = int(SHARE * (self._free_bytes(_HOST) + taken)) - taken

    def keep(self, call: AttentionCall, site: CallSite, dense: Tensor) -> None:
        """Keep a call of a refresh. dense: its result, in the caller's form."""
        keys, result = ResidualStore.keys(call, site), call.take_back(dense)
        if keys is None or result is None:
            return
        key, made = tuple(keys), RefreshedCall(call, result)
        with self._lock:
            if key in self._kept or len(set(keys)) < len(keys):
                self._ambiguous.add(key)
            if key in self._ambiguous:
                self._kept.pop(key, None)
                return
            self._came.add(key)
            if not self._turn:
                self._waiting.add(key)
            elif key not in self._turn:
                return
            while _bytes(made) > self._room and self._earlier:
                given_up = key if key in self._earlier else next(reversed(self._earlier))
                self._room += _bytes(self._earlier.pop(given_up))
            if _bytes(made) > self._room:
                self._short = True
                return
            self._room -= _bytes(made)
            self._kept[key] = _on(_HOST, made, copy=True)

    def get(self, call: AttentionCall, site: CallSite) -> RefreshedCall | str:
        """The call of the same layer and conditions at the last refresh, on the device of `call`, or why it is not
        known."""
        key = tuple(ResidualStore.keys(call, site) or ())
        with self._lock:
            found, earlier = self._kept.get(key), self._earlier.get(key)
            if found is None:
                short = key in self._came - self._ambiguous and self._short
                return _NO_MEMORY if short else _UNKNOWN
            self._waiting.discard(key)
            lead = self._lead
        found = _on(call.q.device, found)
        return found if earlier is None else found._replace(earlier=_on(call.q.device, earlier), lead=lead)


def _bytes(made: RefreshedCall) -> int:
    return sum(x.nbytes for x in (made.call.q, made.call.k, made.call.v, made.dense))


def _on(device: torch.device, made: RefreshedCall, copy: bool = False) -> RefreshedCall:
    """On a device. copy: in memory of its own in any case."""
    q, k, v, dense = (x.detach().to(device, copy=copy) for x in (made.call.q, made.call.k, made.call.v, made.dense))
    return RefreshedCall(replace(made.call, q=q, k=k, v=v, transformer_options={}), dense)

"""The attention calls of a refresh, kept for a search that measures later calls with the residuals they leave."""
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
    """The calls of the last refresh. Threads of several GPUs share it.

    A residual depends on the setting that it is made with, so a search needs q, k, v and the dense result themselves.
    They lie in ordinary memory: four tensors a layer, which are 400 MB a layer and condition of Wan 1.3B at 32760
    tokens. Where they don't all fit, those that were left out come first at the next refresh.
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
            self._ambiguous: set[Hashable] = set()  # what came twice in one evaluation
            self._left_out: set[Hashable] = set()
            self._turn: frozenset[Hashable] = frozenset()  # where memory is short: what may be kept at this refresh
            self._room = 0

    def begin(self) -> None:
        """Start a refresh: drop the calls of the last one."""
        with self._lock:
            self._kept.clear()
            self._turn = frozenset(self._left_out)
            self._room = int(SHARE * self._free_bytes(_HOST))

    def keep(self, call: AttentionCall, site: CallSite, dense: Tensor) -> None:
        """Keep a call of a refresh. dense: its result, in the caller's form."""
        keys, result = ResidualStore.keys(call, site), call.take_back(dense)
        if keys is None or result is None:
            return
        key, size = tuple(keys), sum(x.nbytes for x in (call.q, call.k, call.v, result))
        with self._lock:
            if key in self._kept or len(set(keys)) < len(keys):
                self._ambiguous.add(key)
            if key in self._ambiguous:
                self._kept.pop(key, None)
                return
            if self._turn and key not in self._turn:
                return
            if size > self._room:
                self._left_out.add(key)
                return
            self._room -= size
            self._left_out.discard(key)
            q, k, v, result = (x.detach().to(_HOST, copy=True) for x in (call.q, call.k, call.v, result))
            self._kept[key] = RefreshedCall(replace(call, q=q, k=k, v=v, transformer_options={}), result)

    def get(self, call: AttentionCall, site: CallSite) -> RefreshedCall | str:
        """The call of the same layer and conditions at the last refresh, on the device of `call`, or why it is not
        known."""
        key = tuple(ResidualStore.keys(call, site) or ())
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                short = key and key not in self._ambiguous and (self._turn or self._left_out)
                return _NO_MEMORY if short else _UNKNOWN
        before, device = found.call, call.q.device
        q, k, v, dense = (x.to(device) for x in (before.q, before.k, before.v, found.dense))
        return RefreshedCall(replace(before, q=q, k=k, v=v), dense)

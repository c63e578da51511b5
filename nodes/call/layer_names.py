"""Names of a model's attention layers, the same in every evaluation: what tuned parameters are kept under."""
from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from .transformer_blocks import TransformerBlock

_KEY = "spargeattn_layers"  # in transformer_options: how many self-attention calls each block has made so far
_UNNUMBERED = re.compile(r"#(\d+)")
_LEFT_OUT = "this evaluation may leave layers out, and the model does not number them"
_thread = threading.local()


class LayerNames:
    """Names the self-attention calls of a model, and tells where a name is in doubt.

    A layer is "single:3" and the like, "single:3#2" for the second self-attention of that transformer block, and "#5"
    where the model does not number its blocks. A layer without a number is known by its place in the evaluation alone.
    Where one is left out (skip-layer guidance, a cache), those behind it would take each other's names. An evaluation
    shows at its end how many calls it made. If it made fewer than another one, or than were tuned, all evaluations of
    its kind are in doubt from then on. Evaluations with replaced blocks are in doubt from the first, because ComfyUI
    skips blocks by replacing them.
    """

    def __init__(self, tuned: Iterable[str] = ()):
        """tuned: names of layers that the model has."""
        self._tuned = max((int(match[1]) for match in map(_UNNUMBERED.fullmatch, tuned) if match), default=0)
        self.begin()

    def begin(self) -> None:
        """Start a run."""
        self.blocks: set[TransformerBlock] = set()  # of the evaluations that have ended
        self._most = self._tuned  # unnumbered calls of an evaluation
        self._fewest: dict[Hashable, int] = {}  # the same for each kind

    def count(self, executor, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
              control: dict | None = None, transformer_options: dict | None = None, **conds):
        """An APPLY_MODEL wrapper: counts the calls of an evaluation of the model."""
        options = {**(transformer_options or {})}
        # Another node on this model may have put its counter there.
        calls: Counter[TransformerBlock | None] = options.setdefault(_KEY, Counter())
        out = executor(x, t, c_concat, c_crossattn, control, options, **conds)
        self.blocks |= {block for block in calls if block is not None}
        unnumbered = calls[None]
        if unnumbered:  # an evaluation that comes out of a cache makes none
            kind = _kind(options)
            self._fewest[kind] = min(unnumbered, self._fewest.get(kind, unnumbered))
            self._most = max(unnumbered, self._most)
        return out

    def name(self, transformer_options: dict, block: TransformerBlock | None) -> str | None:
        """The layer's name, None outside an evaluation. Ask once a call of self-attention: asking counts it."""
        calls = transformer_options.get(_KEY)
        if calls is None:
            return None
        given = getattr(_thread, "name", None)
        if given is not None:
            return given
        calls[block] += 1
        if block is None:
            return f"#{calls[block]}"
        return str(block) if calls[block] == 1 else f"{block}#{calls[block]}"

    def doubt(self, name: str | None, transformer_options: dict) -> str:
        """Why this name may be another layer's, empty where it is certain."""
        if name is None or not _UNNUMBERED.fullmatch(name):
            return ""
        kind = _kind(transformer_options)
        seen = self._fewest.get(kind)
        certain = not kind[1] if seen is None else seen == self._most
        return "" if certain else _LEFT_OUT


@contextmanager
def handed_on(name: str | None) -> Iterator[None]:
    """Hold a name while an override hands its call to another one, which must not count the call again."""
    before, _thread.name = getattr(_thread, "name", None), name
    try:
        yield
    finally:
        _thread.name = before


def _kind(transformer_options: dict) -> tuple[tuple, frozenset]:
    """What evaluations of the same layers share: conditions, and the transformer blocks that a node has replaced."""
    replaced = transformer_options.get("patches_replace") or {}
    return tuple(transformer_options.get("cond_or_uncond") or ()), frozenset(replaced.get("dit") or ())

"""Where the visual tokens of an attention call lie: the grid, and how many other tokens stand on either side of it.

An `Expectation` comes from the latent that the model was called with (see `model_rules`). The token count of a call
confirms or refutes it.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...hilbert import sequence_order

Grid = tuple[int, int, int]
UNSEEN = "the model was called in a way that hides its latent"
KEY = "spargeattn_expectation"  # in transformer_options, from `expect_tokens` to the attention calls


class ExactTokens(TypedDict):
    """Ranges of tokens that stay exact, under the names by which `sparge_attention` takes them."""

    sink_keys: tuple[tuple[int, int], ...]
    dense_queries: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `before` other tokens, the tokens of a (T, H, W) grid row by row, and `after` other tokens.

    The others are text, references, audio and padding.

    exact: ranges (start, stop) of others that attend everything, in any order of the tokens.
    """

    grid: Grid
    before: int = 0
    after: int = 0
    exact: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return self.before + math.prod(self.grid) + self.after

    @property
    def others(self) -> tuple[tuple[int, int], ...]:
        """Ranges (start, stop) of the tokens outside the grid.

        As sink keys they are always attended, in whole blocks, so that a block which mixes both kinds misleads no
        query. As queries they are left to the similarity judge, where the selection has one: it finds the blocks that
        their mean does not describe, and the other blocks may skip visual blocks like any query, unless they are
        `exact`.
        """
        ranges = (0, self.before), (self.tokens - self.after, self.tokens)
        return tuple(span for span in ranges if span[0] < span[1])

    def sink_keys(self, reordered: bool) -> tuple[tuple[int, int], ...]:
        """The ranges that every query attends: the others, where a curve has moved the grid before them or where some
        of them are exact."""
        return self.others if reordered or self.exact else ()

    def order(self, curve: str, device: torch.device) -> Tensor:
        """The token order for blocking, int32 (tokens,): first the grid along `curve`, then the other tokens.

        With the grid first, the boxes of the curve fill blocks exactly, however many tokens stand before the grid in
        the model.
        """
        return sequence_order(self.grid, before=self.before, after=self.after, curve=curve, device=device)

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        parts = self.before, "×".join(map(str, self.grid)), self.after
        return " + ".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class Expectation:
    """What the attention calls of one evaluation of a model should look like.

    grid: None where the model tells it at each call.
    before, after: tokens on either side of the grid. One of them may be None: that side takes all tokens that a call
        has beyond the others, either none or at least `least`.
    text: tokens of the text condition. A call over exactly as many may belong to a text encoder.
    exact: whether the tokens before the grid stay exact, but for `clips`, ranges (start, stop) of reference clips.
    """

    grid: Grid | None
    before: int | None = 0
    after: int | None = 0
    least: int = 0
    text: int = 0
    exact: bool = False
    clips: tuple[tuple[int, int], ...] = ()

    def layout(self, tokens: int, transformer_options: dict[str, Any]) -> TokenLayout | str:
        """The layout of a call over `tokens` tokens, or why it is not certain."""
        grid = self.grid or grid_of((transformer_options.get("activations_shape") or ())[2:])
        if grid is None:
            return "the model does not tell the shape of this layer"
        return _fitted(self, tokens, grid)

    def exact_before(self, before: int) -> tuple[tuple[int, int], ...]:
        """Those of the first `before` tokens that stay exact: all but the clips, or none."""
        edges = [0, *(min(edge, before) for clip in self.clips for edge in clip), before]
        return tuple((start, stop) for start, stop in zip(edges[::2], edges[1::2]) if self.exact and start < stop)


@functools.lru_cache(maxsize=64)  # the calls of a run ask for a few
def _fitted(expected: Expectation, tokens: int, grid: Grid) -> TokenLayout | str:
    """The layout of a call over `tokens` tokens with a grid, or why it is not certain."""
    known = TokenLayout(grid, expected.before or 0, expected.after or 0)
    remaining = tokens - known.tokens
    open_ended = expected.before is None or expected.after is None
    if remaining < 0 or 0 < remaining < expected.least or (remaining and not open_ended):
        return f"{tokens} tokens do not fit {known} with {expected.text} of text"
    if tokens == expected.text:
        return f"{tokens} tokens fit {known}, and the text as well"
    if expected.before is not None:
        return replace(known, after=known.after + remaining)
    return replace(known, before=remaining, exact=expected.exact_before(remaining))


def token_layout(tokens: int, transformer_options: dict[str, Any]) -> TokenLayout | str:
    """The layout of an attention call over `tokens` tokens, or why it is not certain."""
    expectation = transformer_options.get(KEY, UNSEEN)
    try:
        return expectation if isinstance(expectation, str) else expectation.layout(tokens, transformer_options)
    except Exception as problem:  # a model may say anything of its call, and a hint must not end its run
        return f"options that the rule for this model does not understand ({problem})"


def exact_tokens(layout: TokenLayout | str, reordered: bool) -> ExactTokens:
    """Those of a call, none where its layout is not known. reordered: whether a curve has moved the grid."""
    if isinstance(layout, str):
        return {"sink_keys": (), "dense_queries": ()}
    return {"sink_keys": layout.sink_keys(reordered), "dense_queries": layout.exact}


def grid_of(sizes: Iterable[int]) -> Grid | None:
    """(T, H, W) of two or three sizes; None for any other number."""
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) == 2:
        return 1, *sizes
    return sizes if len(sizes) == 3 else None

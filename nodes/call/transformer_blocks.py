"""Transformer blocks of a diffusion model: how ComfyUI names them, and how a user lists them."""
from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

_ITEM = re.compile(r"(?:(?P<kind>[a-z_]+):)?(?P<first>\d+)(?:-(?P<last>\d+))?", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;，；、]+")
_INSIDE = re.compile(r"\s*([-:])\s*")  # an item may be written as "4 - 7"


@dataclass(frozen=True, order=True)
class TransformerBlock:
    """A transformer block: its kind where the model tells ("double", "single", …) and its index within that kind.

    The blocks of a UNet are its "input", "middle" and "output" blocks.
    """

    kind: str
    index: int

    @classmethod
    def of(cls, transformer_options: dict) -> TransformerBlock | None:
        """The block that is running, None where the model does not number its blocks."""
        unet_block = transformer_options.get("block")
        if isinstance(unet_block, tuple) and len(unet_block) >= 2:
            return _block(unet_block[0], unet_block[1])
        index = transformer_options.get("block_index")
        if not isinstance(index, int):
            return None
        return _block(transformer_options.get("block_type") or "", index)

    def names(self, other: TransformerBlock) -> bool:
        """Whether this names `other`; a block without a kind names that index of any kind."""
        return self.index == other.index and self.kind in ("", other.kind)

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.kind else str(self.index)


_block = functools.lru_cache(maxsize=1024)(TransformerBlock)


@dataclass(frozen=True)
class ListedBlocks:
    """A user's choice of transformer blocks, such as "0, 1, 47-49, single:0-3".

    A bare number means that index of every kind. Commas, semicolons (also those of Chinese text) and spaces separate
    the items.

    ranges: (kind, first index, last index) of each item; the kind is None for every kind.
    """

    ranges: tuple[tuple[str | None, int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ListedBlocks:
        """Raises ValueError naming the item that is no block number, no range, and neither of them after `kind:`."""
        ranges = []
        for item in filter(None, _BETWEEN.split(_INSIDE.sub(r"\1", text))):
            match = _ITEM.fullmatch(item)
            if match is None:
                raise ValueError(f"dense_blocks must list block numbers and ranges, such as '0, 1, 47-49' "
                                 f"or 'single:0-3'; got '{item}'")
            first = int(match["first"])
            last = int(match["last"] or first)
            if last < first:
                raise ValueError(f"dense_blocks must have ranges that go up; got '{item}'")
            ranges.append((match["kind"] and match["kind"].lower(), first, last))
        return cls(tuple(ranges))

    def without(self, blocks: Iterable[TransformerBlock]) -> ListedBlocks:
        """The items that name none of `blocks`."""
        return ListedBlocks(tuple(item for item in self.ranges
                                  if not any(block in ListedBlocks((item,)) for block in blocks)))

    def __contains__(self, block: TransformerBlock) -> bool:
        return any(first <= block.index <= last and kind in (None, block.kind) for kind, first, last in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __str__(self) -> str:
        return ", ".join((f"{kind}:" if kind else "") + (f"{first}-{last}" if last > first else str(first))
                         for kind, first, last in self.ranges)

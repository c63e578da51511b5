"""Block maps kept for a report: of every block of the model, at one step of a run."""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call.transformer_blocks import TransformerBlock

LARGEST = 128  # rows and columns of a kept map: what a picture can show
_FULL_COST_STEPS = 16


@dataclass(frozen=True)
class MapRequest:
    """Which step to keep the maps of, and a block that must be among them.

    step: counted from 1; 0 for the first step that is sparse. block: None for any.
    """

    step: int = 0
    block: TransformerBlock | None = None


@dataclass
class BlockPictures:
    """The maps of one run: {block: uint8 (H, rows, columns)}, 255 where every pair of a pixel is attended.

    Predicting a map again costs a small part of a call. At one step of many that is nothing; in a run of a few steps
    only every n-th block is kept, so that it stays below one call in `_FULL_COST_STEPS`.
    """

    request: MapRequest = field(default_factory=MapRequest)
    steps: int = 0  # of the run, as scheduled; 0 where nothing tells
    step: int = 0  # the step that is kept, 0 before it comes
    maps: dict[TransformerBlock, Tensor] = field(default_factory=dict)
    _seen: int = 0

    def wants(self, step: int, block: TransformerBlock) -> bool:
        """Whether to keep the map of this call; a block called twice in a step is kept once."""
        if step != (self.step or self.request.step or step) or block in self.maps:
            return False
        self.step = step
        self._seen += 1
        stride = math.ceil(_FULL_COST_STEPS / self.steps) if self.steps else _FULL_COST_STEPS
        chosen = self.request.block is not None and self.request.block.names(block)
        return chosen or (self._seen - 1) % stride == 0

    def add(self, block: TransformerBlock, mask: Tensor) -> None:
        """mask: bool (H, nq, nk), on any device; nothing waits for it."""
        self.maps[block] = shrink(mask)

    def fetch(self) -> BlockPictures:
        """The same on the host."""
        self.maps = {block: self.maps[block].cpu() for block in sorted(self.maps)}
        return self


def shrink(mask: Tensor, largest: int = LARGEST) -> Tensor:
    """bool (H, nq, nk) → uint8 (H, ≤ largest, ≤ largest): the share of True among the entries of each pixel, × 255."""
    heads, *size = mask.shape
    tall, wide = (math.ceil(n / largest) for n in size)
    mask = torch.nn.functional.pad(mask, (0, -size[1] % wide, 0, -size[0] % tall))
    rows, columns = mask.shape[1] // tall, mask.shape[2] // wide
    kept = mask.view(heads, rows, tall, columns, wide).sum(dim=(2, 4), dtype=torch.int32)
    whole = [(n - step * torch.arange(count, device=mask.device)).clamp(max=step)
             for n, count, step in zip(size, (rows, columns), (tall, wide))]
    return (kept * 255 / (whole[0][:, None] * whole[1])).round().to(torch.uint8)

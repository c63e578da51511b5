"""Block maps kept for a report: of the model's transformer blocks, at one step of a run."""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call.transformer_blocks import TransformerBlock

LARGEST = 128  # rows and columns of a kept map: what a picture can show
_FULL_COST_STEPS = 64


@dataclass(frozen=True)
class MapRequest:
    """The block map that a user asks to see.

    step: counted from 1; 0 for the first step that is sparse.
    block: None for the first transformer block whose maps were kept. A run keeps the maps of a block that is named.
    head: of the transformer block.
    """

    step: int = 0
    block: TransformerBlock | None = None
    head: int = 0


@dataclass
class BlockPictures:
    """The block maps of one run.

    Predicting a map again costs a part of a call, and as much as a short one, which waits for the host. So it is done
    at one step, and in a run of fewer than `_FULL_COST_STEPS` for every n-th transformer block alone, so that it costs
    less than one call in so many.

    steps: of the run, as scheduled; 0 where nothing tells.
    step: the step whose maps are kept, 0 before it comes.
    maps: uint8 (H, rows, columns) of each transformer block, 255 where every pair of a pixel is attended.
    """

    request: MapRequest = field(default_factory=MapRequest)
    steps: int = 0
    step: int = 0
    maps: dict[TransformerBlock, Tensor] = field(default_factory=dict)
    _seen: int = 0

    def wants(self, step: int, block: TransformerBlock) -> bool:
        """Whether to keep the map of this call; a transformer block called twice in a step is kept once."""
        if step != (self.step or self.request.step or step) or block in self.maps:
            return False
        self.step = step
        self._seen += 1
        stride = math.ceil(_FULL_COST_STEPS / self.steps) if self.steps else _FULL_COST_STEPS
        chosen = self.request.block is not None and self.request.block.names(block)
        return chosen or (self._seen - 1) % stride == 0

    def add(self, block: TransformerBlock, mask: Tensor) -> None:
        """mask: bool (H, q_blocks, k_blocks), on any device; nothing waits for it."""
        self.maps[block] = shrink(mask)

    def fetch(self) -> BlockPictures:
        """The same on the host."""
        self.maps = {block: self.maps[block].cpu() for block in sorted(self.maps)}
        return self


def shrink(mask: Tensor, largest: int = LARGEST) -> Tensor:
    """bool (H, q_blocks, k_blocks) → uint8 (H, ≤ largest, ≤ largest): the share of True in each pixel, × 255."""
    heads, *size = mask.shape
    tall, wide = (math.ceil(n / largest) for n in size)
    mask = torch.nn.functional.pad(mask, (0, -size[1] % wide, 0, -size[0] % tall))
    rows, columns = mask.shape[1] // tall, mask.shape[2] // wide
    kept = mask.view(heads, rows, tall, columns, wide).sum(dim=(2, 4), dtype=torch.int32)
    # The pixels at the lower and right edge may hold fewer entries than the others.
    down, across = ((n - edge * torch.arange(count, device=mask.device)).clamp(max=edge)
                    for n, count, edge in zip(size, (rows, columns), (tall, wide)))
    return (kept * 255 / (down[:, None] * across)).round().to(torch.uint8)

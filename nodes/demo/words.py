"""The words that the demo's model has learnt. A prompt is eleven of them, and each is a fixed vector in its place."""

from functools import cache

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
TEXTURES = ("plain", "stripes", "checker", "dots")
MOTIONS = ("right", "left", "up", "down", "orbit", "spin", "pulse")
PANS = ("right", "left", "up", "down")

_OBJECT = (SHAPES, COLOURS, TEXTURES, MOTIONS)
SLOTS = (*_OBJECT, *(("none", *words) for words in _OBJECT), COLOURS, TEXTURES, PANS)
TEXT_DIM = 64
# For prompt(): an object, a background and, in some, a second object.
SCENES = {
    "red star, yellow ring": ("star red plain right", "blue checker left", "ring yellow plain left"),
    "spinning cyan triangle": ("triangle cyan stripes spin", "orange plain up"),
    "checkered yellow ball": ("circle yellow checker left", "purple stripes right"),
    "green ring, white square": ("ring green plain orbit", "white dots down", "square white plain up"),
    "pulsing orange ball, purple star": ("circle orange plain pulse", "cyan stripes down", "star purple plain orbit"),
    "spinning red square": ("square red stripes spin", "white checker right"),
}


@cache
def _vocabulary(device: torch.device) -> Tensor:
    """(slots, words, TEXT_DIM) unit-variance vectors, one for each word in each place of a prompt."""
    generator = torch.Generator().manual_seed(2502)
    words = max(map(len, SLOTS))
    return torch.randn(len(SLOTS), words, TEXT_DIM, generator=generator).to(device)


def prompt(first: str, background: str, second: str = "none none none none") -> Tensor:
    """Word indices (11,) of e.g. ``prompt("star red stripes right", "blue checker left")``.

    An object is "shape colour texture motion", a background "colour texture pan".
    Raises ValueError for a word that its place does not know.
    """
    words = [*first.split(), *second.split(), *background.split()]
    if len(words) != len(SLOTS):
        raise ValueError(f"a prompt must have 4 + 4 + 3 words, got {len(words)}: {words}")
    for word, slot in zip(words, SLOTS):
        if word not in slot:
            raise ValueError(f"word must be one of {slot}, got {word!r}")
    return torch.tensor([slot.index(word) for word, slot in zip(words, SLOTS)])


def encode(prompts: Tensor) -> Tensor:
    """(B, 11) word indices -> (B, 11, TEXT_DIM) context. The empty prompt is a context of zeros."""
    table = _vocabulary(prompts.device)
    return table[torch.arange(len(SLOTS), device=prompts.device), prompts]

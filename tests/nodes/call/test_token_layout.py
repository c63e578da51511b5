"""The layout of a sequence: a grid between other tokens."""
import torch

from comfyui_spargeattn.hilbert import sequence_order
from comfyui_spargeattn.nodes.call.token_layout import TokenLayout


def test_order_starts_with_the_grid():
    layout = TokenLayout((2, 3, 4), before=5, after=6)
    order = layout.order("hilbert", torch.device("cpu"))
    assert torch.equal(order[:24], sequence_order((2, 3, 4)) + 5)
    assert order[24:].tolist() == [*range(5), *range(29, 35)]
    assert layout.others == ((0, 5), (29, 35)) and str(layout) == "5 + 2×3×4 + 6"
    assert TokenLayout((2, 3, 4)).others == () and str(TokenLayout((2, 3, 4))) == "2×3×4"

"""The layout of a sequence: a grid between other tokens."""
import pytest
import torch

from comfyui_spargeattn.hilbert import sequence_order
from comfyui_spargeattn.nodes.call.token_layout import Expectation, TokenLayout


def test_order_starts_with_the_grid():
    layout = TokenLayout((2, 3, 4), before=5, after=6)
    order = layout.order("hilbert", torch.device("cpu"))
    assert torch.equal(order[:24], sequence_order((2, 3, 4)) + 5)
    assert order[24:].tolist() == [*range(5), *range(29, 35)]
    assert layout.others == ((0, 5), (29, 35)) and str(layout) == "5 + 2×3×4 + 6"
    assert TokenLayout((2, 3, 4)).others == () and str(TokenLayout((2, 3, 4))) == "2×3×4"


@pytest.mark.parametrize("clips, exact", (
    ((), ((0, 20),)),
    (((4, 9),), ((0, 4), (9, 20))),
    (((0, 9), (9, 12)), ((12, 20),)),
    (((4, 9), (15, 30)), ((0, 4), (9, 15))),  # of other conditions than this call's
    (((25, 30),), ((0, 20),)),
    (((0, 20),), ()),
))
def test_tokens_that_stay_exact(clips, exact):
    """Those before the grid but for clips, never any of the grid."""
    layout = Expectation((2, 3, 4), before=None, exact=True, clips=clips).layout(20 + 24, {})
    assert layout == TokenLayout((2, 3, 4), before=20, exact=exact)
    assert layout.sink_keys(reordered=True) == ((0, 20),)
    assert layout.sink_keys(reordered=False) == (((0, 20),) if exact else ())

"""Orders of visual tokens that keep neighbours of the grid together; importing this needs torch alone."""
from .permutation import CURVES, grid_order, inverse, sequence_order

__all__ = ["CURVES", "grid_order", "inverse", "sequence_order"]

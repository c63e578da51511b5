"""Orders of visual tokens that keep neighbours of the grid together; importing this needs torch alone."""
from .permutation import CURVES, free_device_orders, grid_order, inverse, sequence_order

__all__ = ["CURVES", "free_device_orders", "grid_order", "inverse", "sequence_order"]

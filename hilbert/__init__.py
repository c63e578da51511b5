"""Orders of visual tokens that keep neighbours of the grid together. Importing this needs torch alone."""
from .permutation import CURVES, free_device_orders, sequence_order

__all__ = ["CURVES", "free_device_orders", "sequence_order"]

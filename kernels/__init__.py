"""Block-sparse quantised attention after SpargeAttn; importing this needs torch alone."""
from ._triton.measured import load_configurations
from .api import attention_residual, block_map, block_shape, block_sparse_attention, sparge_attention
from .capability import select_implementation
from .dense import dense_attention
from .failures import FastPathError
from .types import BlockMap, BlockShape, Residual, SpargeParams, SpargeStats

__all__ = ["BlockMap", "BlockShape", "FastPathError", "Residual", "SpargeParams", "SpargeStats", "attention_residual",
           "block_map", "block_shape", "block_sparse_attention", "dense_attention", "load_configurations",
           "select_implementation", "sparge_attention"]

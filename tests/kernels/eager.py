"""The eager reference by keyword, as tests write a call."""
from torch import Tensor

from comfyui_spargeattn.kernels import BlockMap, BlockShape, SpargeParams, SpargeStats, reference
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds


def sparge_attention(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams = SpargeParams(),
                     block: BlockShape = reference.BLOCK, **fields) -> tuple[Tensor, BlockMap, SpargeStats]:
    """`reference.sparge_attention`; `fields` are those of `CallSpec`."""
    return reference.sparge_attention(q, k, v, CallSpec(Thresholds.of(params, q.device), **fields), block)

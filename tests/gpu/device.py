"""What the GPU tests share."""
import pytest
import torch

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def relative_l1(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Σ|O−O'| / Σ|O|, the paper's measure."""
    return ((out.double() - exact.double()).abs().sum() / exact.double().abs().sum()).item()

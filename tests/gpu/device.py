"""What the GPU tests share."""
import pytest
import torch

from comfyui_spargeattn.tests.assertions import relative_l1

__all__ = ["needs_gpu", "relative_l1"]

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

"""INT8 P·V rounds probabilities up or down by chance, so that small ones count on average."""
import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE

EVERY_BLOCK = SpargeParams(cdf_threshold=1.0)


def one_large(bits: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (1, 2, N, 64) whose every 32nd key has 2^bits times the probability of the others, which alone have
    values: 1 in the first channel."""
    n, d = 512, 64
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 2, n, d)
    q[..., 0] = 1.0 + 0.1 * torch.rand(1, 2, n, generator=generator)  # so that hardly two rows have one maximum
    k = torch.zeros(1, 2, n, d)
    large = torch.arange(n) % 32 == 0
    k[:, :, large, 0] = bits * d ** 0.5 / 1.4427
    k[..., 1:] = torch.randn(1, 2, n, d - 1, generator=generator)
    v = torch.zeros(1, 2, n, d)
    v[:, :, ~large, 0] = 1.0
    v[..., 1] = torch.linspace(-1, 1, n)
    return tuple(x.to(DEVICE) for x in (q, k, v))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("bits", [6, 9])
def test_small_probabilities_count(bits, impl):
    q, k, v = one_large(bits)
    out = sparge_attention(q, k, v, params=EVERY_BLOCK, pv_dtype="int8", impl=impl)[..., 0].double()
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))[..., 0]
    # Rounded to the nearest of 127 steps, probabilities below 2^-8 are lost: all of the result for bits = 9.
    torch.testing.assert_close(out.mean(), exact.mean(), rtol=0.15, atol=0.0)

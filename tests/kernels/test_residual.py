"""The residual of dense attention: its format, its place in the reference, and what it may be."""
import pytest
import torch

from comfyui_spargeattn.kernels import (
    Residual,
    SpargeParams,
    attention_residual,
    dense_attention,
    sparge_attention,
)
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.cases import drifting_qkv

PARAMS = SpargeParams(cdf_threshold=0.5, similarity_threshold=-1.0)


@pytest.fixture
def qkv():
    return drifting_qkv(2, 4, 300, 16, kv_heads=2, dtype=torch.float32)


def test_int8_with_a_scale_for_each_row():
    noise = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    difference = noise * torch.logspace(-6, 6, 50)[:, None]
    difference[0, 0, 7] = 0
    residual = Residual.of(difference)
    assert residual.quantised.dtype == torch.int8 and residual.quantised.shape == difference.shape
    assert residual.scale.dtype == torch.float32 and residual.scale.shape == difference.shape[:3]
    assert_near(residual.tensor(), difference, atol=0.51 * difference.abs().amax(-1, keepdim=True) / 127)
    assert residual.bytes == difference.numel() + 4 * difference[..., 0].numel()


def test_not_finite_is_zero():
    difference = torch.ones(1, 1, 2, 4)
    difference[0, 0, 0, 1:3] = torch.tensor([torch.nan, -torch.inf])
    assert torch.equal(Residual.of(difference).tensor()[0, 0, 0], torch.tensor([1.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
def test_gives_dense_attention_back(layout, qkv):
    q, k, v, dense = (x if layout == "BHND" else x.transpose(1, 2) for x in (*qkv, dense_attention(*qkv).float()))
    made = attention_residual(q, k, v, dense, params=PARAMS, layout=layout)
    assert made.quantised.shape == (2, 4, 300, 16)
    sparse = sparge_attention(q, k, v, params=PARAMS, layout=layout)
    assert (dense - sparse).abs().max() > 0.01
    out = sparge_attention(q, k, v, params=PARAMS, layout=layout, residual=made)
    step = made.scale[..., None] if layout == "BHND" else made.scale.transpose(1, 2)[..., None]
    assert_near(out, dense, atol=0.51 * step + 1e-6)


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
def test_leads_beyond_an_earlier_one(layout, qkv):
    """By the definition; parts of other tensors, and what leads beyond float32."""
    q, k, v, dense = (x if layout == "BHND" else x.transpose(1, 2) for x in (*qkv, dense_attention(*qkv).float()))
    how = dict(params=PARAMS, layout=layout)
    made = attention_residual(q, k, v, dense, **how)
    earlier = Residual.of(torch.randn(3, 4, 300, 16, generator=torch.Generator().manual_seed(1)) * 0.1).batch(1, 3)
    led = attention_residual(q, k, v, dense, earlier=earlier, lead=0.3, **how)
    expected = made.tensor() + 0.3 * (made.tensor() - earlier.tensor())
    rounding = 0.51 * (1.3 * made.scale + expected.abs().amax(-1) / 127)
    assert_near(led.tensor(), expected, atol=rounding[..., None] + 1e-6)
    assert torch.equal(attention_residual(q, k, v, dense, lead=0.3, **how).quantised, made.quantised)
    earlier.scale[0, 0, 3] = torch.inf
    led = attention_residual(q, k, v, dense, earlier=earlier, lead=0.3, **how)
    assert led.tensor().isfinite().all() and not led.quantised[0, 0, 3].any() and led.quantised[0, 0, 2].any()


def test_half_precision_differs_by_what_attention_computes(qkv):
    """Rounding of the sparse result is not taken for a part of what it lacks."""
    q, k, v = (x.half() for x in qkv)
    made = attention_residual(q, k, v, dense_attention(q, k, v).half(), params=SpargeParams(cdf_threshold=1.0))
    rounding = torch.finfo(torch.half).eps
    assert made.tensor().abs().max() <= dense_attention(q, k, v).abs().max() * rounding


@pytest.mark.parametrize("residual, error, says", [
    (torch.zeros(2, 4, 300, 16), TypeError, "must be a Residual; got Tensor"),
    (Residual(torch.zeros(2, 4, 300, 16), torch.zeros(2, 4, 300)), TypeError, "int8 and float32; got torch.float32"),
    (Residual.empty((2, 4, 299, 16), torch.device("cpu")), ValueError, r"shapes \(2, 4, 300, 16\)"),
    (Residual.empty((2, 300, 4, 16), torch.device("cpu")), ValueError, "heads before tokens"),
    (Residual(torch.zeros(2, 300, 4, 16, dtype=torch.int8).transpose(1, 2), torch.zeros(2, 4, 300)), ValueError,
     "must be contiguous"),
    (Residual.empty((2, 4, 300, 16), torch.device("meta")), ValueError, "must be on cpu; got meta"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_residual(residual, error, says, qkv):
    with pytest.raises(error, match=f"residual {says}" if says.startswith("must") else f"^residual .*{says}"):
        sparge_attention(*qkv, residual=residual)


@pytest.mark.parametrize("argument, error, says", [
    (dict(earlier=torch.zeros(2, 4, 300, 16)), TypeError, "earlier must be a Residual; got Tensor"),
    (dict(earlier=Residual.empty((2, 4, 299, 16), torch.device("cpu"))), ValueError, "earlier must have shapes"),
    (dict(lead="1"), TypeError, "lead must be a number; got str"),
    (dict(lead=float("nan")), ValueError, "lead must be finite; got nan"),
], ids=("a tensor", "tokens", "text", "NaN"))
def test_bad_earlier_residual(argument, error, says, qkv):
    with pytest.raises(error, match=says):
        attention_residual(*qkv, dense_attention(*qkv).float(), **argument)


@pytest.mark.parametrize("dense, error", [(1.0, TypeError), (torch.zeros(2, 4, 299, 16), ValueError),
                                          (torch.zeros(2, 4, 300, 16).half(), ValueError)])
def test_bad_dense(dense, error, qkv):
    with pytest.raises(error, match="^dense must be "):
        attention_residual(*qkv, dense)

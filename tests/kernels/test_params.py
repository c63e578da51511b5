"""SpargeParams: validation."""
import dataclasses
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams


def test_defaults():
    params = SpargeParams()
    assert dict(params.items()) == dict(cdf_threshold=0.99, similarity_threshold=0.5, pv_threshold=math.inf)
    assert (params.selection, params.amount, params.heads) == ("cdf", 0.99, None)
    params = SpargeParams(topk=0.5)
    assert (params.selection, params.amount, params.cdf_threshold) == ("topk", 0.5, None)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpargeParams().topk = 0.5


ALLOWED = [dict(cdf_threshold=1), dict(cdf_threshold=1e-6), dict(topk=1.0), dict(similarity_threshold=-1),
           dict(similarity_threshold=1.0), dict(pv_threshold=0), dict(pv_threshold=math.inf),
           dict(cdf_threshold=torch.tensor([0.1, 1.0])), dict(pv_threshold=torch.tensor([0.0, math.inf])),
           dict(topk=torch.tensor([0.5], dtype=torch.float16))]


@pytest.mark.parametrize("values", ALLOWED, ids=str)
def test_allowed(values):
    SpargeParams(**values)


REFUSED = [
    (dict(cdf_threshold=0.0), ValueError, ["cdf_threshold", "(0, 1]", "0"]),
    (dict(cdf_threshold=1.01), ValueError, ["cdf_threshold", "1.01"]),
    (dict(cdf_threshold=math.nan), ValueError, ["cdf_threshold", "nan"]),
    (dict(topk=-0.25), ValueError, ["topk", "-0.25"]),
    (dict(topk=2), ValueError, ["topk", "(0, 1]", "2"]),
    (dict(similarity_threshold=-1.5), ValueError, ["similarity_threshold", "[-1, 1]", "-1.5"]),
    (dict(similarity_threshold=math.nan), ValueError, ["similarity_threshold", "nan"]),
    (dict(pv_threshold=-3.0), ValueError, ["pv_threshold", "[0, inf]", "-3"]),
    (dict(pv_threshold=math.nan), ValueError, ["pv_threshold", "nan"]),
    (dict(cdf_threshold="0.9"), TypeError, ["cdf_threshold", "str"]),
    (dict(topk=True), TypeError, ["topk", "bool"]),
    (dict(similarity_threshold=None), TypeError, ["similarity_threshold", "NoneType"]),
    (dict(cdf_threshold=0.9, topk=0.5), ValueError, ["cdf_threshold", "topk", "0.9", "0.5"]),
    (dict(cdf_threshold=torch.tensor(0.9)), ValueError, ["cdf_threshold", "1-D", "()"]),
    (dict(cdf_threshold=torch.ones(2, 2)), ValueError, ["cdf_threshold", "(2, 2)"]),
    (dict(cdf_threshold=torch.ones(0)), ValueError, ["cdf_threshold", "(0,)"]),
    (dict(topk=torch.ones(3, dtype=torch.int64)), ValueError, ["topk", "int64"]),
    (dict(topk=torch.tensor([0.5, 1.5])), ValueError, ["topk", "0.5", "1.5"]),
    (dict(cdf_threshold=torch.tensor([0.5, math.nan])), ValueError, ["cdf_threshold", "nan"]),
    (dict(cdf_threshold=torch.full((2,), 0.5), pv_threshold=torch.ones(3)), ValueError,
     ["one length", "cdf_threshold", "2", "pv_threshold", "3"]),
]


@pytest.mark.parametrize("values, error, says", REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_refused(values, error, says):
    with pytest.raises(error) as caught:
        SpargeParams(**values)
    for part in says:
        assert part in str(caught.value)

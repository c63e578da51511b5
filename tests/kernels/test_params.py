"""SpargeParams: validation, saving, loading."""
import dataclasses
import math

import pytest
import torch
from safetensors.torch import save_file

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


SAVED = [SpargeParams(), SpargeParams(topk=0.25, pv_threshold=10.0),
         SpargeParams(cdf_threshold=torch.tensor([0.5, 1.0]), similarity_threshold=-1.0),
         SpargeParams(topk=torch.tensor([0.5, 0.25]), similarity_threshold=torch.tensor([0.1, 0.9]),
                      pv_threshold=torch.tensor([math.inf, 3.0]))]


@pytest.mark.parametrize("params", SAVED, ids=range(len(SAVED)))
def test_save_and_load(params, tmp_path):
    params.save(tmp_path / "params.safetensors")
    loaded = SpargeParams.load(tmp_path / "params.safetensors")
    assert [name for name, _ in loaded.items()] == [name for name, _ in params.items()]
    assert loaded.selection == params.selection and loaded.heads == params.heads
    for (_, saved), (_, read) in zip(params.items(), loaded.items()):
        assert type(read) is (torch.Tensor if isinstance(saved, torch.Tensor) else float)
        assert torch.equal(torch.as_tensor(read, dtype=torch.float32), torch.as_tensor(saved, dtype=torch.float32))


def test_save_keeps_numbers_between_loads(tmp_path):
    path = tmp_path / "params.safetensors"
    SpargeParams(cdf_threshold=0.97).save(path)
    first = SpargeParams.load(path)
    first.save(path)
    assert SpargeParams.load(path).items() == first.items()


OURS = {"format": "comfyui_spargeattn.SpargeParams", "version": "1"}
WRONG_FILES = [
    ({"topk": 0.5}, None, "metadata"),
    ({"topk": 0.5}, {"format": "other", "version": "1"}, "other"),
    ({"topk": 0.5}, OURS | {"version": "2"}, "2"),
    ({"topk": 0.5, "blocks": 3.0}, OURS, "blocks"),
    ({"topk": math.nan}, OURS, "topk"),
    ({"topk": 0.5, "cdf_threshold": 0.5}, OURS, "exclude"),
    ({"cdf_threshold": 7.0}, OURS, "7"),
]


@pytest.mark.parametrize("values, metadata, says", WRONG_FILES)
def test_wrong_tensors(values, metadata, says, tmp_path):
    path = tmp_path / "wrong.safetensors"
    save_file({name: torch.tensor(value) for name, value in values.items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match=says):
        SpargeParams.load(path)


def test_not_safetensors(tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_text("thresholds: high")
    with pytest.raises(ValueError, match="text.safetensors"):
        SpargeParams.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SpargeParams.load(tmp_path / "none.safetensors")

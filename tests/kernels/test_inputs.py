"""Every input without a meaning is refused with the argument's name and the value it got."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_map, sparge_attention

HALF = torch.float16


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


Q, KV = tensor(2, 4, 10, 8), tensor(2, 2, 12, 8)
SQUARE = dict(k=tensor(2, 2, 10, 8), v=tensor(2, 2, 10, 8))
# name: (arguments that differ from a call that works, exception, parts of its message)
REFUSED = {
    "q is a list": (dict(q=[1.0]), TypeError, ["q must be a tensor", "list"]),
    "v is None": (dict(v=None), TypeError, ["v must be a tensor", "NoneType"]),
    "q is 3-D": (dict(q=tensor(2, 10, 32)), ValueError, ["q", "BHND", "(2, 10, 32)"]),
    "k is 5-D": (dict(k=tensor(1, 2, 2, 12, 8)), ValueError, ["k", "(1, 2, 2, 12, 8)"]),
    "q is empty": (dict(q=tensor(2, 4, 0, 8)), ValueError, ["q", "empty", "(2, 4, 0, 8)"]),
    "k is empty": (dict(k=tensor(2, 2, 0, 8)), ValueError, ["k", "empty", "(2, 2, 0, 8)"]),
    "q is an integer": (dict(q=tensor(2, 4, 10, 8, dtype=torch.int32)), TypeError, ["q", "float16", "int32"]),
    "q is float8": (dict(q=tensor(2, 4, 10, 8).to(torch.float8_e4m3fn)), TypeError, ["q", "float8"]),
    "k has another dtype": (dict(k=KV.to(HALF)), ValueError, ["k", "float32", "float16"]),
    "v has another device": (dict(v=KV.to("meta")), ValueError, ["v", "cpu", "meta"]),
    "v has another shape": (dict(v=tensor(2, 2, 11, 8)), ValueError, ["v", "(2, 2, 12, 8)", "(2, 2, 11, 8)"]),
    "k has another batch": (dict(k=tensor(3, 2, 12, 8), v=tensor(3, 2, 12, 8)), ValueError,
                            ["k", "batch", "(2, 4, 10, 8)", "(3, 2, 12, 8)"]),
    "k has another head_dim": (dict(k=tensor(2, 2, 12, 16), v=tensor(2, 2, 12, 16)), ValueError,
                               ["k", "head_dim", "(2, 2, 12, 16)"]),
    "heads are no multiple": (dict(k=tensor(2, 3, 12, 8), v=tensor(2, 3, 12, 8)), ValueError,
                              ["heads", "multiple", "4", "3"]),
    "params is a dict": (dict(params={"topk": 0.5}), TypeError, ["params", "SpargeParams", "dict"]),
    "params has other heads": (dict(params=SpargeParams(topk=torch.full((3,), 0.5))), ValueError, ["params", "4", "3"]),
    "scale is infinite": (dict(scale=math.inf), ValueError, ["scale", "finite", "inf"]),
    "scale is NaN": (dict(scale=math.nan), ValueError, ["scale", "finite", "nan"]),
    "scale is text": (dict(scale="auto"), TypeError, ["scale", "number", "str"]),
    "layout": (dict(layout="NHD"), ValueError, ["layout", "BHND", "BNHD", "NHD"]),
    "mask is a list": (dict(key_padding_mask=[True]), TypeError, ["key_padding_mask", "tensor", "list"]),
    "mask is float": (dict(key_padding_mask=tensor(2, 12)), TypeError, ["key_padding_mask", "bool", "float32"]),
    "mask has q's length": (dict(key_padding_mask=tensor(2, 10, dtype=torch.bool)), ValueError,
                            ["key_padding_mask", "(2, 12)", "(2, 10)"]),
    "mask has another device": (dict(key_padding_mask=tensor(2, 12, dtype=torch.bool, device="meta")), ValueError,
                                ["key_padding_mask", "cpu", "meta"]),
    "order is a list": (SQUARE | dict(order=list(range(10))), TypeError, ["order", "tensor", "list"]),
    "order is float": (SQUARE | dict(order=tensor(10)), TypeError, ["order", "int32", "float32"]),
    "order with cross lengths": (dict(order=torch.arange(12)), ValueError, ["order", "10", "12"]),
    "order and causal": (SQUARE | dict(order=torch.arange(10), causal=True), ValueError, ["order", "causal=True"]),
    "order is short": (SQUARE | dict(order=torch.arange(9)), ValueError, ["order", "(10,)", "(2, 10)", "(9,)"]),
    "order per query head": (SQUARE | dict(order=torch.arange(10).expand(4, 10)), ValueError,
                             ["order", "(2, 10)", "(4, 10)"]),
    "order on another device": (SQUARE | dict(order=torch.arange(10, device="meta")), ValueError,
                                ["order", "cpu", "meta"]),
    "sink beyond the keys": (dict(sink_keys=[(0, 2), (11, 13)]), ValueError, ["sink_keys", "12", "(11, 13)"]),
    "sink backwards": (dict(sink_keys=[(5, 2)]), ValueError, ["sink_keys", "(5, 2)"]),
    "sink negative": (dict(sink_keys=[(-4, 2)]), ValueError, ["sink_keys", "(-4, 2)"]),
    "sink is one range": (dict(sink_keys=(0, 4)), TypeError, ["sink_keys", "(start, stop)", "0"]),
    "sink is fractional": (dict(sink_keys=[(0, 1.5)]), TypeError, ["sink_keys", "integers", "(0, 1.5)"]),
    "sink has three ends": (dict(sink_keys=[(0, 1, 2)]), TypeError, ["sink_keys", "(start, stop)", "(0, 1, 2)"]),
    "dense beyond the queries": (dict(dense_queries=[(0, 11)]), ValueError, ["dense_queries", "10", "(0, 11)"]),
    "impl": (dict(impl="cuda"), ValueError, ["impl", "triton", "reference", "cuda"]),
}
ATTENTION_ONLY = {
    "pv_dtype": (dict(pv_dtype="bf16"), ValueError, ["pv_dtype", "int8", "bf16"]),
    "skipped": (dict(skipped="mean"), ValueError, ["skipped", "drop", "pooled", "mean"]),
}


def refuse(function, arguments, error, says):
    with pytest.raises(error) as caught:
        function(arguments)
    for part in says:
        assert part in str(caught.value), f"{part!r} is missing in: {caught.value}"


@pytest.mark.parametrize("changes, error, says", (REFUSED | ATTENTION_ONLY).values(),
                         ids=(REFUSED | ATTENTION_ONLY).keys())
def test_attention_refuses(changes, error, says):
    refuse(lambda call: sparge_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call),
           dict(q=Q, k=KV, v=KV) | changes, error, says)


@pytest.mark.parametrize("changes, error, says", [case for case in REFUSED.values() if "v" not in case[0]],
                         ids=[name for name, case in REFUSED.items() if "v" not in case[0]])
def test_map_refuses(changes, error, says):
    refuse(lambda call: block_map(call.pop("q"), call.pop("k"), **call), dict(q=Q, k=KV) | changes, error, says)


def test_bnhd_checks_its_own_dimensions():
    q, kv = tensor(2, 10, 4, 8), tensor(2, 12, 2, 8)
    assert sparge_attention(q, kv, kv, layout="BNHD", key_padding_mask=tensor(2, 12, dtype=torch.bool)).shape == q.shape
    with pytest.raises(ValueError, match="sink_keys"):
        sparge_attention(q, kv, kv, layout="BNHD", sink_keys=[(0, 13)])
    with pytest.raises(ValueError, match="multiple"):
        sparge_attention(q, tensor(2, 12, 3, 8), tensor(2, 12, 3, 8), layout="BNHD")


def test_a_name_never_falls_back():
    with pytest.raises(RuntimeError, match="impl='triton'.*cpu"):
        sparge_attention(Q, KV, KV, impl="triton")
    with pytest.raises(RuntimeError, match="impl='triton'.*cpu"):
        block_map(Q, KV, impl="triton")

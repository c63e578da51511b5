"""Which calls go sparse, when, and what is said about it: the node's decisions, without ComfyUI."""
from functools import partial
from itertools import pairwise

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, capability
from comfyui_spargeattn.nodes.call import plan as policy
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.plan import Dense, NodeSettings, SparsePlan, plan_call
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock
from comfyui_spargeattn.nodes.run.sigma_window import SigmaWindow

PARAMS = SpargeParams(topk=0.5, similarity_threshold=-1.0)
SETTINGS = NodeSettings(PARAMS, start_percent=0.0, min_tokens=64)


def make_call(tokens=128, keys=None, heads=2, kv_heads=None, head_dim=8, dtype=torch.float32, device="cpu", **kwargs):
    """A call in layout BHND; `kwargs` are further arguments of AttentionCall."""
    q = torch.zeros(1, heads, tokens, head_dim, dtype=dtype, device=device)
    k = torch.zeros(1, kv_heads or heads, keys or tokens, head_dim, dtype=dtype, device=device)
    return AttentionCall(q, k, k, "BHND", **kwargs)


def reason(call, settings=SETTINGS, block=None, in_window=True):
    plan = plan_call(call, settings, block, in_window)
    return str(plan) if isinstance(plan, Dense) else None


def test_self_attention_goes_sparse():
    assert plan_call(make_call(), SETTINGS, None, True) == SparsePlan(PARAMS, "reference")


@pytest.mark.parametrize("call, expected", (
    (make_call(keys=77), "cross-attention (128 queries, 77 keys)"),
    (make_call(tokens=63), "fewer tokens than min_tokens (63 < 64)"),
    (make_call(low_precision=False), "the model asks for full precision"),
    (make_call(dtype=torch.float64), "unsupported dtype"),
    (make_call(dtype=torch.float8_e4m3fn), "unsupported dtype"),
    (make_call(head_dim=264), "unsupported head_dim (264 > 256)"),
    (make_call(heads=4, kv_heads=2), "unsupported numbers of heads (4 of q, 2 of k)"),
    (make_call(heads=3, kv_heads=2, enable_gqa=True), "unsupported numbers of heads"),
    (make_call(mask=torch.zeros(1, 128, 128)), "mask that differs from query to query (torch.float32 (1, 128, 128))"),
    (make_call(mask=torch.ones(128, 128, dtype=torch.bool)), "mask that differs from query to query (torch.bool"),
    (make_call(mask=torch.zeros(1, 2, 1, 128)), "unsupported mask (torch.float32 (1, 2, 1, 128))"),
    (make_call(mask=torch.zeros(1, 1, 128).double()), "unsupported mask (torch.float64 (1, 1, 128))"),
    (make_call(mask=torch.zeros(128)), "unsupported mask (torch.float32 (128,))"),
    (make_call(mask=torch.ones(1, 1, 1, 128, dtype=torch.bool, device="meta")), "tensors on different devices"),
    (make_call(scale=torch.tensor(1.0)), "unsupported scale (Tensor)"),
    (make_call(scale=float("nan")), "unsupported scale"),
    (make_call(device="meta"), "no fast kernel (no kernels for device type meta)"),
    (make_call(tokens=16385), "too many tokens for the CPU (16385 > 16384)"),
), ids=lambda value: value if isinstance(value, str) else "")
def test_calls_that_stay_dense(call, expected):
    assert (reason(call) or "sparse").startswith(expected)


@pytest.mark.parametrize("call", (
    make_call(tokens=64), make_call(tokens=16384), make_call(head_dim=256), make_call(dtype=torch.bfloat16),
    make_call(heads=4, kv_heads=2, enable_gqa=True), make_call(scale=0.1), make_call(scale=1),
    make_call(mask=torch.ones(1, 1, 1, 128, dtype=torch.bool)), make_call(mask=torch.zeros(1, 1, 128)),
))
def test_calls_at_the_limits_go_sparse(call):
    assert reason(call) is None


def test_tensors_that_do_not_fit_stay_dense():
    q, k = torch.zeros(2, 2, 128, 8), torch.zeros(1, 2, 128, 8)
    assert reason(AttentionCall(q, k, k, "BHND")).startswith("shapes of q, k and v do not fit")
    assert reason(AttentionCall(k, k, k[..., :4], "BHND")).startswith("shapes of q, k and v do not fit")
    empty = torch.zeros(0, 2, 128, 8)
    assert reason(AttentionCall(empty, empty, empty, "BHND")).startswith("shapes of q, k and v do not fit")


def test_calls_that_need_gradients_stay_dense():
    q = torch.zeros(1, 2, 128, 8, requires_grad=True)
    call = AttentionCall(q, q, q, "BHND")
    assert reason(call) == "gradients are needed"
    with torch.no_grad():
        assert reason(call) is None


def test_fp8_stays_dense_where_the_hardware_has_none(monkeypatch):
    monkeypatch.setattr(capability, "triton_version", lambda: (3, 5))
    monkeypatch.setattr(policy, "select_implementation", lambda q: ("triton", None))
    settings = NodeSettings(PARAMS, min_tokens=64, pv_dtype="fp8")
    for arch, expected in (("sm80", True), ("sm89", False), ("gfx1100", True)):
        monkeypatch.setattr(policy, "arch_of", lambda device, arch=arch: arch)
        assert (reason(make_call(), settings) is not None) == expected, arch
        assert reason(make_call(), SETTINGS) is None


def test_long_sequences_go_sparse_on_a_fast_kernel(monkeypatch):
    monkeypatch.setattr(policy, "select_implementation", lambda q: ("triton", None))
    assert reason(make_call(tokens=100_000, device="meta")) is None


def test_window_and_dense_blocks():
    settings = NodeSettings(PARAMS, min_tokens=64, dense_blocks=ListedBlocks.parse("1"))
    assert reason(make_call(), settings, in_window=False) == "outside start_percent … end_percent"
    assert reason(make_call(), settings, TransformerBlock("double", 1)) == "listed in dense_blocks (block double:1)"
    assert reason(make_call(), settings, TransformerBlock("double", 0)) is None
    assert reason(make_call(), settings, None) is None


@pytest.mark.parametrize("text, inside, outside", (
    ("", "", "0 single:0"),
    ("0, 1, 47-49", "0 1 47 48 49 single:48", "2 46 50"),
    ("single:0-3,double:7", "single:0 single:3 double:7", "0 double:0 single:7 single:4"),
    (" 3 - 4 , Input : 2,", "3 4 input:2", "2 5"),
    ("0 1", "0 1", "2 10"),
    ("4 7", "4 7", "47 5"),
    ("1 2-3 0", "0 1 2 3", "12 30 20"),
    ("0，1、3；5;7\n9", "0 1 3 5 7 9", "2 4 6 8"),
    ("single:0 -2 double : 1", "single:2 double:1", "0 double:2"),
))
def test_block_lists(text, inside, outside):
    blocks = ListedBlocks.parse(text)
    assert bool(blocks) == bool(inside)
    for name in inside.split() + outside.split():
        kind, _, index = name.rpartition(":")
        assert (TransformerBlock(kind, int(index)) in blocks) == (name in inside.split()), name


@pytest.mark.parametrize("text", ("x", "3-1", "-1", "1.5", "0/1", "1-2-3", "single:"))
def test_bad_block_lists(text):
    with pytest.raises(ValueError, match=f"dense_blocks .*'{text}'"):
        ListedBlocks.parse(text)


def test_listed_blocks_that_a_model_lacks():
    listed = ListedBlocks.parse("0, 99, single:1, foo:3, 2-5, 8-9")
    present = {TransformerBlock("", 0), TransformerBlock("single", 1), TransformerBlock("double", 4)}
    assert str(listed.without(present)) == "99, foo:3, 8-9"
    assert not ListedBlocks().without({TransformerBlock("", 0)})


@pytest.mark.parametrize("options, expected", (
    ({"block_index": 3, "block_type": "double"}, TransformerBlock("double", 3)),
    ({"block_index": 3}, TransformerBlock("", 3)),
    ({"block": ("input", 4), "block_index": 1}, TransformerBlock("input", 4)),
    ({}, None),
))
def test_block_that_runs(options, expected):
    assert TransformerBlock.of(options) == expected


def flow(percent):
    """percent_to_sigma of a flow model without shift."""
    return 1.0 - percent


def follow(window, sigmas, schedule=None):
    """(inside at each evaluation, number of reads)."""
    reads = []

    def read(sigma):
        reads.append(sigma)
        return sigma

    window.begin(flow, sigmas if schedule is None else schedule)
    inside = []
    for sigma in sigmas:
        window.advance(partial(read, sigma))
        inside.append(window.inside)
    return inside, len(reads)


TEN_STEPS = torch.linspace(1, 0, 11).tolist()[:-1]  # float32 values, as a sampler has them


@pytest.mark.parametrize("start, end, first, last, reads", (
    (0.0, 1.0, 0, 9, 0),
    (0.2, 1.0, 2, 9, 1),  # settled before the window by the schedule, inside it for good
    (0.25, 1.0, 3, 9, 1),
    (0.0, 0.5, 0, 5, 10),
    (0.2, 0.5, 2, 5, 8),
    (1.0, 1.0, None, None, 0),
))
def test_window(start, end, first, last, reads):
    expected = [first is not None and first <= i <= last for i in range(10)]
    assert follow(SigmaWindow(start, end), TEN_STEPS) == (expected, reads)


def test_window_of_a_sampler_that_evaluates_twice_a_step():
    sigmas = [sigma for pair in pairwise(TEN_STEPS) for sigma in pair]
    inside, _ = follow(SigmaWindow(0.3, 1.0), sigmas, TEN_STEPS)
    assert inside == [sigma <= 0.7 + 1e-6 for sigma in sigmas]


def test_window_of_a_schedule_that_rises_is_read_each_time():
    sigmas = TEN_STEPS[::-1]
    assert follow(SigmaWindow(0.3, 1.0), sigmas) == ([sigma <= 0.7 + 1e-6 for sigma in sigmas], 10)


def test_window_of_a_schedule_that_falls_and_rises():
    """A sampler that restarts from more noise leaves the window again."""
    sigmas = [1.0, 0.6, 0.4, 0.9, 0.5, 0.1]
    assert follow(SigmaWindow(0.3, 1.0), sigmas)[0] == [False, True, True, False, True, True]


def test_window_outside_a_run():
    assert SigmaWindow(0.0, 1.0).inside
    for bounded in (SigmaWindow(0.1, 1.0), SigmaWindow(0.0, 0.9)):
        assert not bounded.inside
        follow(bounded, TEN_STEPS)
        bounded.reset()
        assert not bounded.inside

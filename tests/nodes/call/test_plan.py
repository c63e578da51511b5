"""Which calls go sparse, when, and what is said about it: the node's decisions, without ComfyUI."""
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call import plan as policy
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.plan import (
    CallSite,
    Dense,
    NodeSettings,
    SparsePlan,
    plan_call,
    plan_without_residual,
)
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock
from comfyui_spargeattn.nodes.tuned.candidates import TunedSetting
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch

PARAMS = SpargeParams(topk=0.5, similarity_threshold=-1.0)
SETTINGS = NodeSettings(PARAMS, start_percent=0.0, min_tokens=64)


def make_call(tokens=128, keys=None, heads=2, kv_heads=None, head_dim=8, dtype=torch.float32, device="cpu", **kwargs):
    """A call in layout BHND; `kwargs` are further arguments of AttentionCall."""
    q = torch.zeros(1, heads, tokens, head_dim, dtype=dtype, device=device)
    k = torch.zeros(1, kv_heads or heads, keys or tokens, head_dim, dtype=dtype, device=device)
    return AttentionCall(q, k, k, "BHND", **kwargs)


def reason(call, settings=SETTINGS, block=None):
    plan = plan_call(call, settings, CallSite(block))
    return str(plan) if isinstance(plan, Dense) else None


def test_self_attention_goes_sparse():
    assert plan_call(make_call(), SETTINGS) == SparsePlan(PARAMS, "reference")


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


def test_long_sequences_go_sparse_on_a_fast_kernel(monkeypatch):
    monkeypatch.setattr(policy, "select_implementation", lambda q: ("triton", None))
    assert reason(make_call(tokens=100_000, device="meta")) is None


@pytest.mark.parametrize("given, amount", [
    (SpargeParams(cdf_threshold=0.8, similarity_threshold=0.3, pv_threshold=9.0), 0.99),
    (SpargeParams(cdf_threshold=0.995, similarity_threshold=0.3, pv_threshold=9.0), 0.995),
    (SpargeParams(topk=0.1, similarity_threshold=0.3, pv_threshold=9.0), 0.99),
    (SpargeParams(cdf_threshold=torch.tensor([0.5, 0.995]), similarity_threshold=0.3, pv_threshold=9.0),
     torch.tensor([0.99, 0.995])),
])
def test_without_a_residual_more_is_kept(given, amount):
    plan = SparsePlan(given, "reference", skipped="pooled", pv_dtype="fp16", curve="hilbert")
    alone = plan.keeping(policy.ALONE)
    assert torch.equal(torch.as_tensor(alone.params.amount), torch.as_tensor(amount))
    assert (alone.params.selection, alone.params.similarity_threshold, alone.params.pv_threshold) == ("cdf", 0.3, 9.0)
    assert (alone.skipped, alone.pv_dtype, alone.curve) == ("pooled", "fp16", "hilbert")


def test_dense_blocks():
    settings = NodeSettings(PARAMS, min_tokens=64, dense_blocks=ListedBlocks.parse("1"))
    assert reason(make_call(), settings, TransformerBlock("double", 1)) == "listed in dense_blocks (block double:1)"
    assert reason(make_call(), settings, TransformerBlock("double", 0)) is None
    assert reason(make_call(), settings, None) is None


def tuned(refreshes):
    """The settings with parameters of one layer."""
    params = SpargeParams(topk=torch.full((2,), 0.1), similarity_threshold=torch.full((2,), -1.0))
    search = replace(LayerSearch.start(2, 2), setting=TunedSetting(params, ("row-major",) * 2, "pooled", "fp16"))
    return replace(SETTINGS, tuned=TunedParams(Architecture("Model", {}), Bounds(), {"#1": TunedLayer(search, 8)},
                                               refreshes=refreshes))


@pytest.mark.parametrize("refreshes", (0, 3))
def test_what_was_tuned_for_refreshes_needs_a_residual(refreshes):
    settings, call, site = tuned(refreshes), make_call(), CallSite(layer="#1")
    plan = plan_call(call, settings, site)
    assert plan.skipped == "pooled" and plan.needs_residual == (refreshes > 0)
    without = plan_without_residual(plan, call, settings, site)
    if refreshes:
        assert without == SparsePlan(PARAMS, "reference", untuned="they were tuned for refreshes, and this call has no "
                                                                  "residual")
    else:
        assert without is plan
    other = plan_call(call, settings, CallSite(layer="#2"))
    assert not other.needs_residual and plan_without_residual(other, call, settings, CallSite(layer="#2")) is other

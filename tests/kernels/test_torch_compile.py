"""torch.compile without a graph break: the op's fake implementation says what the real one returns."""
import pytest
import torch

from comfyui_spargeattn.kernels import Residual, SpargeParams, sparge_attention
from comfyui_spargeattn.tests.cases import drifting_qkv

PER_HEAD = SpargeParams(cdf_threshold=torch.tensor([0.5, 0.7, 0.9, 1.0]), pv_threshold=6.0)
CALLS = {
    "defaults": {},
    "thresholds": dict(params=SpargeParams(topk=0.3, similarity_threshold=0.2, pv_threshold=5.0), scale=0.2),
    "per head": dict(params=PER_HEAD),
    "statistics": dict(params=PER_HEAD, return_stats=True),
    "causal, other layout": dict(causal=True, layout="BNHD", return_stats=True),
    "tensors and ranges": dict(key_padding_mask=torch.arange(200).expand(2, -1) > 150, order=torch.arange(200).flip(0),
                               sink_keys=[(0, 7), (90, 95)], dense_queries=[(3, 4)], skipped="pooled"),
    "log-sum-exp": dict(return_stats=True, return_lse=True, layout="BNHD"),
    "residual": dict(residual=Residual.of(torch.ones(2, 4, 200, 16))),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_equals_eager(call):
    q, k, v = drifting_qkv(2, 4, 200, 16, kv_heads=2)
    if call.get("layout") == "BNHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def block(q, k, v):
        result = sparge_attention(q * 2, k, v, **call)
        if not call.get("return_stats"):
            return (result + 1,)
        out, stats, *lse = result
        return out + 1, stats.kept, stats.sparsity, stats.pv_skipped, *lse

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(q, k, v)
    for seen, expected in zip(compiled, block(q, k, v), strict=True):
        assert torch.equal(seen, expected)


def test_new_length():
    """The second length compiles once more, for any length."""
    compiled = torch.compile(lambda *qkv: sparge_attention(*qkv), fullgraph=True, backend="aot_eager")
    for n in (100, 150, 170, 190):
        qkv = drifting_qkv(1, 2, n, 16)
        assert torch.equal(compiled(*qkv), sparge_attention(*qkv))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
@pytest.mark.parametrize("return_stats", (False, True))
def test_fake_matches_real(layout, return_stats):
    q = drifting_qkv(2, 4, 70, 16)[0]
    q = q if layout == "BHND" else q.transpose(1, 2)
    call = dict(per_head=None, key_padding_mask=None, key_bias=None, order=None, thresholds=[0.9, 0.5, 8.0],
                scale=None, sink_keys=[], dense_queries=[], causal=False, return_stats=return_stats, selection="cdf",
                layout=layout, pv_dtype="auto", skipped="drop", impl="reference")
    torch.library.opcheck(torch.ops.comfyui_spargeattn.attention.default, (q, q, q), call,
                          test_utils=("test_schema", "test_faketensor"))

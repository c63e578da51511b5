"""The result written over v: the same as elsewhere, in less memory, and an error of its own where v is lost."""
import weakref

import pytest
import torch

from comfyui_spargeattn.kernels import (
    FastPathError,
    Residual,
    SpargeParams,
    block_map,
    failures,
    sparge_attention,
)
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE

N, HEADS, DIM = 150, 6, 64
ORDER = torch.arange(N).roll(40)
PER_HEAD = SpargeParams(cdf_threshold=torch.linspace(0.3, 0.9, HEADS), similarity_threshold=-1.0, pv_threshold=5.0)


@pytest.fixture
def pipeline(monkeypatch, small_blocks):
    """The module, to which every sequence is long and nothing has failed yet."""
    from comfyui_spargeattn.kernels._triton import memory, pipeline
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(failures, "_failed", {})
    return pipeline


@pytest.fixture
def groups(pipeline, monkeypatch):
    """How many heads every group had."""
    taken, attend = [], pipeline._attention
    monkeypatch.setattr(pipeline, "_attention", lambda q, *rest: (taken.append(q.shape[1]), attend(q, *rest))[1])
    return taken


def tensors(layout="BHND", heads=HEADS, kv_heads=None):
    qkv = drifting_qkv(1, heads, N, DIM, kv_heads=kv_heads, dtype=torch.float16, device=DEVICE)
    return qkv if layout == "BHND" else tuple(x.transpose(1, 2).contiguous() for x in qkv)


def attend(q, k, v, **call):
    return sparge_attention(q, k, v, impl="triton", pv_dtype="fp16", return_stats=True, **call)


def calls():
    return {
        "plain": dict(params=SpargeParams(topk=0.3)),
        "heads that differ": dict(params=PER_HEAD.to(DEVICE), skipped="pooled", layout="BNHD", order=torch.stack(
            [ORDER.roll(head) for head in range(HEADS)]).to(DEVICE)),
        "ordered": dict(params=SpargeParams(topk=0.3), order=ORDER.to(DEVICE), sink_keys=((0, 10),), residual=Residual(
            torch.full((1, HEADS, N, DIM), 3, dtype=torch.int8, device=DEVICE),
            torch.full((1, HEADS, N), 0.01, device=DEVICE))),
        "masked": dict(params=SpargeParams(topk=0.3), key_padding_mask=torch.arange(N, device=DEVICE)[None] > 130),
    }


@pytest.mark.parametrize("name", calls())
def test_the_same_result(name, groups):
    call = calls()[name]
    q, k, v = tensors(call.get("layout", "BHND"))
    expected, expected_stats = attend(q, k, v.clone(), **call)
    groups.clear()
    copies = q.clone(), k.clone()
    out, stats = attend(q, k, v, overwrite_v=True, **call)
    assert out is v and torch.equal(out, expected)
    assert torch.equal(stats.kept, expected_stats.kept) and torch.equal(stats.pv_skipped, expected_stats.pv_skipped)
    assert all(map(torch.equal, (q, k), copies)), "q or k was overwritten"
    assert len(groups) > 1 and sum(groups) == HEADS and max(groups) == groups[0]


def test_short_sequences_are_not_split(groups, monkeypatch):
    from comfyui_spargeattn.kernels._triton import memory
    monkeypatch.setattr(memory, "SMALL", 1 << 30)
    q, k, v = tensors()
    expected, _ = attend(q, k, v.clone())
    assert torch.equal(attend(q, k, v, overwrite_v=True)[0], expected) and groups == [HEADS] * 2


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
def test_views_of_one_buffer(layout, groups):
    """As MiniMax-H3 has them: q and k in one product, v in memory of its own, whose strides the result gets."""
    q, k, v = tensors()
    buffer = torch.cat([q, k, v], -1).transpose(1, 2).contiguous()  # (1, N, H, 3 D)
    q, k, v = (x.transpose(1, 2) if layout == "BHND" else x for x in buffer.split(DIM, -1))
    v = v.clone(memory_format=torch.preserve_format)
    v = v.transpose(1, 2).contiguous().transpose(1, 2) if layout == "BHND" else v.contiguous()
    expected, _ = attend(q, k, v.clone(), layout=layout)
    out, _ = attend(q, k, v, layout=layout, overwrite_v=True)
    assert out.data_ptr() == v.data_ptr() and out.stride() == v.stride() and torch.equal(out, expected)


@pytest.mark.parametrize("why", ("fewer heads", "gaps", "memory of k", "lse", "reference"))
def test_v_that_can_not_take_the_result(why, pipeline):
    q, k, v = tensors(kv_heads=2 if why == "fewer heads" else None)
    if why == "gaps":
        v = torch.stack([v, v], -2)[..., 0, :]
    elif why == "memory of k":
        k, v = torch.stack([k, v])
    impl = "reference" if why == "reference" else "triton"
    before = v.clone()
    how = dict(impl=impl, return_stats=True, return_lse=why == "lse")
    out, *_ = out_and_more = sparge_attention(q, k, v, overwrite_v=True, **how)
    assert torch.equal(v, before) and out.is_contiguous() and len(out_and_more) == 2 + (why == "lse")
    assert torch.equal(out, sparge_attention(q, k, v, **how)[0])


@pytest.mark.parametrize("kind", (FastPathError, torch.OutOfMemoryError))
@pytest.mark.parametrize("stage", ("prepare_queries", "prepare_keys", "select_blocks", "attend"))
def test_failures(kind, stage, pipeline, monkeypatch):
    """Before anything is written the error is that of any call, and v is whole. Later it is one that nobody takes for a
    reason to compute the call elsewhere."""
    q, k, v = tensors()
    before, run, works = v.clone(), getattr(pipeline, stage), [0]

    def fail(*args, **kwargs):
        if not works[0]:
            raise kind("no room")
        works[0] -= 1
        return run(*args, **kwargs)

    monkeypatch.setattr(pipeline, stage, fail)
    with pytest.raises(kind):
        attend(q, k, v, overwrite_v=True)
    assert torch.equal(v, before)
    failures.forget()
    works[0] = 1
    with pytest.raises(RuntimeError, match="overwritten some of v: no room") as caught:
        attend(q, k, v, overwrite_v=True)
    assert not isinstance(caught.value, kind) and not torch.equal(v, before)
    assert torch.equal(v[:, -1], before[:, -1])  # the last group was not reached


def test_statistics_that_find_no_room(pipeline, monkeypatch):
    """They come after the launch that writes."""
    def fail(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(pipeline, "count", fail)
    with pytest.raises(RuntimeError, match="overwritten some of v"):
        attend(*tensors(), overwrite_v=True)


def test_kernels_that_fail_leave_v_to_the_reference(pipeline, monkeypatch):
    q, k, v = tensors()
    expected = sparge_attention(q, k, v.clone(), impl="reference")

    def fail(*args, **kwargs):
        raise FastPathError("no compiler")

    monkeypatch.setattr(pipeline, "attend", fail)
    assert torch.equal(sparge_attention(q, k, v, overwrite_v=True), expected)


class Live:
    """Bytes of tensors that were made and not freed yet: `most` at any time."""

    def __init__(self):
        self.now = self.most = 0

    def watch(self, make):
        def watched(*args, **kwargs):
            x = make(*args, **kwargs)
            self.add(x.untyped_storage().nbytes())
            weakref.finalize(x, self.add, -x.untyped_storage().nbytes())
            return x
        return watched

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_less_memory_than_dense_attention(skipped, pipeline, monkeypatch):
    """What a call takes beside q, k and v stays below the size of the result, and a map below that too."""
    q, k, v = drifting_qkv(1, 8, 256, 64, dtype=torch.float32, device=DEVICE)
    size = v.nbytes
    live = Live()
    with monkeypatch.context() as patches:  # undone before the fixture that poisons memory undoes its own
        patches.setattr(torch, "empty", live.watch(torch.empty))
        attend(q, k, v.clone(), skipped=skipped)
        plain, live.most = live.most, 0
        attend(q, k, v, skipped=skipped, overwrite_v=True)
        assert 0 < live.most < 0.8 * size < 1.5 * size < plain and live.now == 0
        live.most = 0
        block_map(q, k, impl="triton")
        assert 0 < live.most < 0.8 * size and live.now == 0


def test_map_of_a_long_sequence(pipeline, monkeypatch):
    """Groups of heads, put together."""
    from comfyui_spargeattn.kernels._triton import memory
    q, k, _ = tensors(heads=6, kv_heads=3)
    call = dict(params=PER_HEAD.to(DEVICE), order=torch.stack([ORDER, ORDER.flip(0), ORDER.roll(7)]).to(DEVICE))
    found = block_map(q, k, impl="triton", **call)
    monkeypatch.setattr(memory, "SMALL", 1 << 30)
    assert torch.equal(found.mask(), block_map(q, k, impl="triton", **call).mask())

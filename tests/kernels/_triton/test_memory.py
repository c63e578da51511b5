"""Where memory is short, groups of heads give what all heads give at once, in less memory."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockShape, SpargeParams, block_sparse_attention, sparge_attention
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, ON_GPU, recorded_maps

N, HEADS, KV_HEADS = 150, 8, 4


@pytest.fixture
def short(monkeypatch):
    """How many heads of K every attempt took."""
    from comfyui_spargeattn.kernels._triton import pipeline
    taken, attend = [], pipeline._attention

    def record(q, k, *rest):
        taken.append(k.shape[1])
        return attend(q, k, *rest)

    monkeypatch.setattr(pipeline, "_attention", record)
    monkeypatch.setattr(pipeline, "is_short", lambda *size: True)
    return taken


def call(per_head):
    order = torch.stack([torch.arange(N).roll(10 * head) for head in range(KV_HEADS)]).to(DEVICE)
    params = SpargeParams(cdf_threshold=torch.linspace(0.3, 0.9, HEADS), similarity_threshold=-1.0).to(DEVICE)
    return dict(params=params, order=order, return_stats=True, skipped="pooled") if per_head else dict(
        params=SpargeParams(topk=0.3), return_stats=True)


@pytest.mark.parametrize("per_head", (False, True))
def test_groups_give_the_same(per_head, short, monkeypatch, small_blocks):
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v = drifting_qkv(1, HEADS, N, 64, kv_heads=KV_HEADS, dtype=torch.float16, device=DEVICE)
    out, stats = sparge_attention(q, k, v, impl="triton", pv_dtype="fp16", **call(per_head))
    assert len(short) > 1 and sum(short) == KV_HEADS
    monkeypatch.setattr(pipeline, "is_short", lambda *size: False)
    expected, expected_stats = sparge_attention(q, k, v, impl="triton", pv_dtype="fp16", **call(per_head))
    assert torch.equal(out, expected)
    assert torch.equal(stats.kept, expected_stats.kept) and stats.kept.shape == (1, HEADS)


def test_groups_of_a_given_map(short, monkeypatch, small_blocks):
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v = drifting_qkv(1, HEADS, N, 64, kv_heads=KV_HEADS, dtype=torch.float16, device=DEVICE)
    with recorded_maps() as maps:
        sparge_attention(q[:, :2], k[:, :1], v[:, :1], impl="triton", pv_dtype="fp16")
    mask = torch.rand(1, HEADS, *maps[0].mask().shape[2:], generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    out = block_sparse_attention(q, k, v, mask, impl="triton", pv_dtype="fp16")
    monkeypatch.setattr(pipeline, "is_short", lambda *size: False)
    assert torch.equal(out, block_sparse_attention(q, k, v, mask, impl="triton", pv_dtype="fp16"))


def test_memory_that_runs_out(monkeypatch, small_blocks):
    """A whole call that does not fit is tried in groups; one that does not fit so either says so."""
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v = drifting_qkv(1, HEADS, N, 64, kv_heads=KV_HEADS, dtype=torch.float16, device=DEVICE)
    expected = sparge_attention(q, k, v, impl="triton", pv_dtype="fp16")
    attend, most = pipeline._attention, [1]

    def limited(q, k, *rest):
        if k.shape[1] > most[0]:
            raise torch.OutOfMemoryError("no room")
        return attend(q, k, *rest)

    monkeypatch.setattr(pipeline, "_attention", limited)
    assert torch.equal(sparge_attention(q, k, v, impl="triton", pv_dtype="fp16"), expected)
    most[0] = 0
    for impl in ("triton", "auto"):
        with pytest.raises(torch.OutOfMemoryError):
            sparge_attention(q, k, v, impl=impl, pv_dtype="fp16")


def test_group_sizes():
    from comfyui_spargeattn.kernels._triton import memory
    for heads, kv_heads, n in ((24, 24, 20000), (40, 40, 30000), (12, 4, 10000), (1, 1, 5000)):
        q, k = torch.empty(1, heads, n, 128, device="meta"), torch.empty(1, kv_heads, n, 128, device="meta")
        q, k = q.bfloat16(), k.bfloat16()
        size = q, k, False, BlockShape(128, 64), True
        groups = memory.groups_of_heads(*size)
        assert groups[0][0] == 0 and groups[-1][1] == kv_heads
        assert all(a[1] == b[0] for a, b in zip(groups, groups[1:])), "heads left out or taken twice"
        largest = max(last - first for first, last in groups)
        share = memory.copied_bytes(*size) * largest / kv_heads / memory.input_bytes(q, k)
        assert share <= memory.SHARE or largest == 1, f"{share:.2f} of the inputs"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("pv_dtype", ("fp16", "auto"))
def test_peak_beside_dense_attention(pv_dtype, monkeypatch):
    from comfyui_spargeattn.kernels._triton import memory
    q, k, v = drifting_qkv(1, 24, 30000, 128, dtype=torch.bfloat16, device=DEVICE)

    def peak(run):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    dense = peak(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    for skipped in ("drop", "pooled"):
        ours = peak(lambda skipped=skipped: sparge_attention(q, k, v, params=SpargeParams(topk=0.3), skipped=skipped,
                                                             pv_dtype=pv_dtype, impl="triton"))
        assert ours - dense <= 0.25 * memory.input_bytes(q, k), f"{(ours - dense) / memory.input_bytes(q, k):.2f}"

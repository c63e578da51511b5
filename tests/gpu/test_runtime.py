"""A call compiles, can be captured, and needs no synchronisation, no recompilation and no memory beyond its copies."""
import pytest
import torch

from comfyui_spargeattn.kernels import (
    Residual,
    SpargeParams,
    attention_residual,
    block_shape,
    block_sparse_attention,
    sparge_attention,
)
from comfyui_spargeattn.kernels._triton import replay
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.gpu.device import needs_gpu
from comfyui_spargeattn.tests.kernels._triton.harness import PV_FORMATS, recorded_maps

pytestmark = needs_gpu
BF16 = torch.bfloat16
SPARSE = SpargeParams(topk=0.3, similarity_threshold=0.3)


def inputs(n=2000, dim=128, seed=0, heads=4, batch=1):
    return drifting_qkv(batch, heads, n, dim, kv_heads=2, dtype=BF16, device="cuda", seed=seed)


def everything(n, heads=4, batch=1):
    """Arguments that use every path of a call."""
    return dict(params=SpargeParams(cdf_threshold=torch.full((heads,), 0.9), pv_threshold=5.0).to("cuda"),
                key_padding_mask=torch.arange(n, device="cuda").expand(batch, -1) >= n - n // 9,
                order=torch.arange(n, device="cuda", dtype=torch.int32).flip(0), sink_keys=[(0, min(n, 5))],
                dense_queries=[(n // 2, min(n, n // 2 + 3))], skipped="pooled", return_stats=True)


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_repeats_bit_for_bit(pv_dtype):
    """No race decides a bit, whatever the stream."""
    qkv = inputs(8000)
    first = sparge_attention(*qkv, params=SPARSE, pv_dtype=pv_dtype, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        others = [sparge_attention(*qkv, params=SPARSE, pv_dtype=pv_dtype, impl="triton") for _ in range(5)]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("kind", ("plain", "everything", "λ test, tail", "causal", "residual", "residual made"))
def test_repeated_calls(kind, monkeypatch):
    """A call of a known form, for other tensors, on any stream and inside a graph, gives what the long way gives."""
    from comfyui_spargeattn.kernels._triton import pipeline
    n, shape = 2000, (1, 4, 2000, 128)
    residual, made = Residual.of(torch.randn(shape, device="cuda")), kind == "residual made"
    dense = torch.randn(shape, device="cuda", dtype=BF16)
    call = {"plain": dict(params=SPARSE), "causal": dict(causal=True), "everything": everything(n),
            "λ test, tail": dict(params=SpargeParams(topk=0.3, pv_threshold=4.0), skipped="pooled"),
            "residual": dict(residual=residual), "residual made": dict(earlier=residual, lead=0.4)}[kind]
    call = call | dict(sink_keys=((0, 5),), dense_queries=(), impl="triton")
    long_ways, in_memory = [], pipeline._in_memory
    monkeypatch.setattr(pipeline, "_in_memory", lambda *args: (long_ways.append(1), in_memory(*args))[1])

    def run(q, k, v):
        if made:
            result = attention_residual(q, k, v, dense, **call)
            return result.quantised, result.scale
        out, stats = sparge_attention(q, k, v, **call | dict(return_stats=True))
        return out, stats.kept, stats.pv_skipped

    def check(repeated, qkv):
        with replay.off():
            assert all(torch.equal(x, expected) for x, expected in zip(repeated, run(*qkv), strict=True))

    replay.forget()
    run(*inputs())
    for seed in (1, 2):
        qkv = inputs(seed=seed)
        long_ways.clear()
        repeated = run(*qkv)
        assert not long_ways
        check(repeated, qkv)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeated = [run(*qkv) for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    for result in repeated:
        check(result, qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*qkv)
    replay.forget()  # the graph keeps what it reads
    for static, fresh in zip(qkv, inputs(seed=3), strict=True):
        static.copy_(fresh)
    graph.replay()
    check(captured, qkv)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    qkv = inputs()
    expected = sparge_attention(*qkv, params=SPARSE, impl="triton")
    with torch.cuda.device(0):
        out = sparge_attention(*(x.to("cuda:1") for x in qkv), params=SPARSE, impl="triton")
    assert torch.equal(out.to(expected.device), expected)


@pytest.mark.parametrize("call", ("plain", "everything"))
def test_torch_compile(call):
    qkv = inputs()
    call = {} if call == "plain" else everything(2000)

    def run(q, k, v):
        result = sparge_attention(q, k, v, **call)
        return result if isinstance(result, torch.Tensor) else (result[0], result[1].kept, result[1].pv_skipped)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True)(*qkv)
    torch.testing.assert_close(compiled, run(*qkv), rtol=0, atol=0)


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_cuda_graph(pv_dtype):
    """A captured call reads its inputs at every replay."""
    qkv = inputs()
    call = everything(2000) | dict(pv_dtype=pv_dtype, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sparge_attention(*qkv, **call)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, stats = sparge_attention(*qkv, **call)
    for seed in (1, 2):
        for static, fresh in zip(qkv, inputs(seed=seed), strict=True):
            static.copy_(fresh)
        graph.replay()
        expected, expected_stats = sparge_attention(*qkv, **call)
        assert torch.equal(out, expected)
        assert torch.equal(stats.kept, expected_stats.kept) and torch.equal(stats.pv_skipped, expected_stats.pv_skipped)


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_no_synchronisation(pv_dtype):
    qkv = inputs()
    calls = [dict(), dict(params=SPARSE), everything(2000), dict(causal=True, return_stats=True)]
    for call in calls:
        sparge_attention(*qkv, pv_dtype=pv_dtype, impl="triton", **call)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            sparge_attention(*qkv, pv_dtype=pv_dtype, impl="triton", **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("kind", ("plain", "everything"))
def test_no_recompilation(kind, pv_dtype, monkeypatch):
    """A call with another length, batch, number of heads, threshold or scale compiles no kernel. (One that keeps every
    block has a preparation of its own, and so has one with the judge off.)"""
    import triton

    from comfyui_spargeattn.kernels._triton import launch, prepare_queries
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **event: compiled.append(event["fn"].name))

    def run(n, heads, batch, tau, theta, scale):
        call = dict(params=SpargeParams(cdf_threshold=tau, similarity_threshold=theta))
        if kind == "everything":
            call = everything(n, heads, batch)
        qkv = inputs(n, 64, heads=heads, batch=batch)
        sparge_attention(*qkv, scale=scale, pv_dtype=pv_dtype, impl="triton", **call)

    prepare_queries._queries_kernel.device_caches.clear()
    launch.forget()
    for theta in (0.5, -1.0):
        run(1000, 4, 1, 0.9, theta, None)
    assert compiled, "the hook did not see the compilation of a kernel whose cache is empty"
    compiled.clear()
    for n in (1, 15, 16, 17, 64, 128, 1001, 1024, 4097, 20000):
        run(n, 4, 1, 0.9, 0.5, None)
    for heads, batch in ((2, 1), (6, 3), (16, 2), (32, 1)):
        run(1000, heads, batch, 0.9, 0.5, None)
    for tau, theta, scale in ((0.99, 0.5, None), (0.5, -1.0, 1.0), (0.25, 1.0, 16.0), (0.125, 0.0, 0.0)):
        run(1000, 4, 1, tau, theta, scale)
    assert not compiled, f"compiled again: {compiled}"


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("dim", (72, 128))
def test_peak_memory(dim, pv_dtype):
    """Beyond its inputs a call holds the output, the INT8 copies of Q and K, the copy of V, one float32 mean a block,
    the partial sums of a sample, and four bytes for every block pair."""
    from comfyui_spargeattn.kernels._triton.primitives import padded_dim, row_pitch
    batch, heads, kv_heads, n = 1, 8, 2, 30_000
    qkv = drifting_qkv(batch, heads, n, dim, kv_heads=kv_heads, dtype=BF16, device="cuda")
    with recorded_maps() as maps:  # compiles, and allocates cuBLAS's workspace
        sparge_attention(*qkv, params=SPARSE, pv_dtype=pv_dtype, impl="triton")
    block = maps.pop().block
    q_blocks, k_blocks = block.counts(n, n)
    pitch, padded = row_pitch(dim), padded_dim(dim)
    q_copy = heads * q_blocks * (block.q * (pitch + 4) + 4 * dim + 4)
    k_copy = kv_heads * k_blocks * (block.k * pitch + 4 * dim + 16)
    v_copy = kv_heads * k_blocks * block.k * (dim if pv_dtype == "int8" else 2 * pitch)
    sample = kv_heads * 32 * (16 * padded + 4)
    lists = heads * q_blocks * (4 * k_blocks + 12)
    output = 2 * heads * n * dim
    expected = batch * (q_copy + k_copy + v_copy + sample + lists + output)

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sparge_attention(*qkv, params=SPARSE, pv_dtype=pv_dtype, impl="triton")
    peak = torch.cuda.max_memory_allocated() - before
    # The allocator hands out blocks that are up to 1 MiB larger than asked.
    assert peak <= expected * 1.01 + 2 ** 21, f"{peak / 2**20:.1f} MiB > {expected / 2**20:.1f} MiB"
    assert torch.cuda.memory_allocated() - before <= out.numel() * 2 + 2 ** 20, "something outlives the call"


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
def test_given_map_compiled_and_captured(pv_dtype):
    """A map given as a tensor breaks no graph, needs no synchronisation, and is read at every replay."""
    qkv = inputs()
    blocks = block_shape(qkv[0], pv_dtype=pv_dtype, impl="triton").counts(2000, 2000)
    mask = torch.rand(1, 4, *blocks, device="cuda") < 0.5

    def run(q, k, v, mask):
        return block_sparse_attention(q, k, v, mask, pv_dtype=pv_dtype, impl="triton")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True)(*qkv, mask)
    assert torch.equal(compiled, run(*qkv, mask))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*qkv, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*qkv, mask)
    mask.copy_(torch.rand(mask.shape, device="cuda") < 0.3)
    graph.replay()
    assert torch.equal(out, run(*qkv, mask))

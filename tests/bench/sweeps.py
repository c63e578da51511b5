"""How time depends on one quantity: sparsity, length or head_dim."""
from __future__ import annotations

from functools import partial

import torch

from comfyui_spargeattn.kernels import BlockMap, block_shape, block_sparse_attention
from tests.bench.breakdown import kernel_ms
from tests.bench.error_sweep import FORMATS, error_against_time
from tests.bench.measure import GATES, device_ms, gate_error
from tests.bench.peers import cudnn, fixed_share, ours
from tests.cases import video_qkv

SPARSITIES = (0.0, 0.5, 0.8, 0.9)
LENGTHS = [(1024 * n, 12) for n in (2, 4, 8, 16, 32, 64, 128)] + [(2**18, 2), (2**19, 1)]  # and heads
HEADS = [(2**14, heads) for heads in (1, 4, 16, 64)]  # and their length
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160, 192, 256)
_SMALLEST = 128  # tokens of the largest block of keys


def noise(heads: int, n: int, dim: int) -> list[torch.Tensor]:
    """bfloat16 white noise q, k, v (1, H, N, D)."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(1, heads, n, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def sparsity(cases: dict[str, dict], repeats: int) -> list[dict]:
    """Random maps of exactly known sparsity, given to `block_sparse_attention`."""
    rows = []
    for case in ("wan1.3b-480p", "wan14b-720p"):
        q, k, v = video_qkv(**cases[case])
        rows.append(dict(case=case, method="SDPA cuDNN", sparsity=0.0, ms=device_ms(partial(cudnn, q, k, v), repeats)))
        for pv_dtype in FORMATS:
            block = block_shape(q, pv_dtype=pv_dtype, impl="triton")
            q_blocks, k_blocks = block.counts(q.shape[2], k.shape[2])
            for share in SPARSITIES:
                drawn = torch.rand(1, q.shape[1], q_blocks, k_blocks, device="cuda")
                mask = drawn.argsort(-1).argsort(-1) < round((1 - share) * k_blocks)
                run = partial(block_sparse_attention, q, k, v, mask, pv_dtype=pv_dtype, impl="triton")
                l1 = gate_error(run(), q, k, v, BlockMap.from_mask(mask, block))
                rows.append(dict(case=case, method=f"ours {pv_dtype}", sparsity=1 - mask.float().mean().item(),
                                 gate_L1=l1, passed=l1 <= GATES[pv_dtype]))
                if rows[-1]["passed"]:
                    rows[-1]["ms"] = device_ms(run, repeats)
    return rows


def length(cases: dict[str, dict], repeats: int) -> list[dict]:
    """Fixed shares of blocks from 2K to 512K tokens and with 1 to 64 heads; `linear` says whether t(s) ≤ (1−s)·t(0) +
    preparation + 5% t(0). Preparation is the time with one or two blocks in a map row; map_ms the map's part of it."""
    rows = []
    for n, heads in LENGTHS + HEADS:
        q, k, v = noise(heads, n, 128)
        case = dict(n=n, heads=heads)
        rows.append(case | dict(method="SDPA cuDNN", ms=device_ms(partial(cudnn, q, k, v), repeats)))
        for pv_dtype in FORMATS:
            runs = {topk: partial(ours(fixed_share(topk), pv_dtype), q, k, v)
                    for topk in (1.0, 0.5, 0.2, _SMALLEST / n)}
            times = {topk: device_ms(run, repeats) for topk, run in runs.items()}
            preparation = times.pop(_SMALLEST / n)
            map_ms = sum(ms for kernel, ms in kernel_ms(runs[0.2]).items() if "select" in kernel)
            rows += [case | dict(method=f"ours {pv_dtype}", topk=topk, ms=ms, preparation_ms=preparation, map_ms=map_ms,
                                 linear=ms <= topk * times[1.0] + preparation + 0.05 * times[1.0])
                     for topk, ms in times.items()]
    return rows


def head_dim(cases: dict[str, dict], repeats: int) -> list[dict]:
    """Every padded and unpadded head_dim, at 16K tokens and 12 heads."""
    rows = []
    for dim in HEAD_DIMS:
        q, k, v = noise(12, 16384, dim)
        found = {"SDPA cuDNN": cudnn} | {f"ours {pv_dtype} topk {topk}": ours(fixed_share(topk), pv_dtype)
                                         for pv_dtype in FORMATS for topk in (1.0, 0.5, 0.2)}
        for name, method in found.items():
            try:
                rows.append(dict(head_dim=dim, method=name, ms=device_ms(partial(method, q, k, v), repeats)))
            except RuntimeError as problem:
                rows.append(dict(head_dim=dim, method=name, error=str(problem).splitlines()[0]))
    return rows


SWEEPS = {"sparsity": sparsity, "length": length, "head_dim": head_dim, "error": error_against_time}

"""Where a call's time and memory go: kernels by name, host time, the floor that copies set."""
from __future__ import annotations

from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.measure import device_ms, host_us
from tests.bench.peers import fixed_share, ours
from tests.cases import video_qkv

_CALLS = 5


def breakdown(cases: dict[str, dict], repeats: int) -> list[dict]:
    """One row for each case and format, at topk 0.5.

    kernels_ms: device time by kernel; other_ms: the kernels of preparation and map together, without attention.
    copy_floor_ms: a device copy of as many bytes as preparation reads (Q, K, V) and writes (their quantised copies).
    extra_mib: peak memory beyond inputs and output; expected_mib: quantised copies and block list alone.
    """
    rows = []
    for case, shape in cases.items():
        q, k, v = video_qkv(**shape)
        for pv_dtype in ("int8", "fp16"):
            run = partial(ours(fixed_share(0.5), pv_dtype), q, k, v)
            kernels = kernel_ms(run)
            read = sum(x.nbytes for x in (q, k, v))
            written = q.numel() + k.numel() + v.numel() * (1 if pv_dtype == "int8" else 2)
            source = torch.empty((read + written) // 2, dtype=torch.uint8, device="cuda").random_()
            target = torch.empty_like(source)
            floor = device_ms(partial(target.copy_, source), repeats)
            del source, target
            extra, listed = memory(run, q, k, v, pv_dtype)
            rows.append(dict(case=case, method=f"ours {pv_dtype}", kernels_ms=kernels, ms=device_ms(run, repeats),
                             other_ms=sum(ms for name, ms in kernels.items() if "attend" not in name),
                             copy_floor_ms=floor, host_us=host_us(run) if q.shape[2] < 8192 else None,
                             extra_mib=extra / 2**20, expected_mib=(written + listed) / 2**20))
        del q, k, v, run
        torch.cuda.empty_cache()
    return rows


def kernel_ms(run) -> dict[str, float]:
    """Device milliseconds of a call by kernel."""
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(_CALLS):
            run()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1000 / _CALLS for event in traced.key_averages()
            if event.self_device_time_total > 0}


def memory(run, q, k, v, pv_dtype: str) -> tuple[int, int]:
    """(peak bytes of a call beyond inputs and output, bytes of the block list)."""
    from comfyui_spargeattn.kernels import block_shape
    q_blocks, k_blocks = block_shape(q, pv_dtype=pv_dtype, impl="triton").counts(q.shape[2], k.shape[2])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    listed = q.shape[0] * q.shape[1] * q_blocks * (4 * k_blocks + 12)
    return torch.cuda.max_memory_allocated() - before - out.nbytes, listed

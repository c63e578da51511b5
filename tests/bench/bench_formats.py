"""Time and error of the formats of P·V, over shapes, shares of blocks and seeds.

    python -m tests.bench.bench_formats --out formats.json

Structured inputs (`video_qkv`), the similarity judge and the λ test off but where a row says otherwise. L1 is against
PyTorch's attention of the same tensors: in float32 up to 9000 tokens, in bfloat16 beyond.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from tests.assertions import relative_l1
from tests.bench.measure import card, device_ms
from tests.cases import video_qkv

# name -> grid, heads, head_dim, batch, text tokens, seeds
CASES = {
    "wan1.3b-480p": ((21, 30, 52), 12, 128, 1, 0, (11, 12, 13)),
    "flux-1024": ((1, 64, 64), 24, 128, 1, 512, (11, 12, 13)),
    "sd35-1024": ((1, 64, 64), 24, 64, 2, 154, (11,)),
    "head_dim 64": ((21, 30, 52), 12, 64, 1, 0, (11,)),
    "head_dim 256": ((8, 32, 64), 8, 256, 1, 0, (11,)),
}
SETTINGS = {
    **{f"topk {share}": (dict(topk=share), "drop") for share in (1.0, 0.5, 0.2, 0.1)},
    **{f"topk {share}, pooled": (dict(topk=share), "pooled") for share in (0.5, 0.4, 0.3, 0.1)},
    **{f"cdf {share}, pooled": (dict(cdf_threshold=share), "pooled") for share in (0.9, 0.85, 0.8)},
    **{f"topk {share}, λ 20": (dict(topk=share, pv_threshold=20.0), "drop") for share in (1.0, 0.1)},
}


def measure(name: str, seed: int) -> dict:
    """Setting → format → ms, L1 and the share of blocks kept; and cuDNN's time."""
    grid, heads, dim, batch, text, _ = CASES[name]
    q, k, v = video_qkv(grid, heads, dim, batch=batch, text=text, seed=seed)
    exact = F.scaled_dot_product_attention(*((x.float() for x in (q, k, v)) if q.shape[2] < 9000 else (q, k, v)))
    found = {}
    for setting, (thresholds, skipped) in SETTINGS.items():
        params = SpargeParams(similarity_threshold=-1.0, **thresholds)
        for pv_dtype in ("int8", "fp16"):
            how = dict(params=params, pv_dtype=pv_dtype, skipped=skipped, impl="triton")
            out, stats = sparge_attention(q, k, v, return_stats=True, **how)
            found.setdefault(setting, {})[pv_dtype] = dict(
                ms=device_ms(lambda how=how: sparge_attention(q, k, v, **how), repeats=12), L1=relative_l1(out, exact),
                kept=stats.kept.mean().item())
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        found["cuDNN"] = dict(ms=device_ms(lambda: F.scaled_dot_product_attention(q, k, v), repeats=12))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    report = card() | dict(cases={})
    for name in options.cases:
        report["cases"][name] = {}
        for seed in CASES[name][-1]:
            report["cases"][name][seed] = measure(name, seed)
            print(name, seed, json.dumps(report["cases"][name][seed]), flush=True)
            options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()

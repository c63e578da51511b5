"""Small calls of every kind, to run under compute-sanitizer: `compute-sanitizer python sanitized_calls.py`."""
import math
import sys

import torch

from comfyui_spargeattn.kernels import (
    SpargeParams,
    attention_residual,
    block_map,
    block_shape,
    block_sparse_attention,
    sparge_attention,
)
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels._triton.harness import PV_FORMATS

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOPK, CDF = SpargeParams(topk=0.5), SpargeParams(cdf_threshold=0.7, similarity_threshold=0.3)
SKIPPING = SpargeParams(cdf_threshold=0.7, pv_threshold=2.0)
PER_HEAD = SpargeParams(topk=torch.tensor([0.3, 0.5, 0.7, 1.0]), pv_threshold=torch.tensor([1.0, 2.0, 4.0, math.inf]))
# (q_tokens, k_tokens, head_dim, dtype, heads, heads of k, the call); True stands for a tensor of the call's size.
VARIANTS = [
    (1, 1, 64, F16, 2, 2, dict(params=CDF)),
    (129, 200, 40, BF16, 2, 1, dict(params=CDF, sink_keys=[(0, 1), (60, 70)], dense_queries=[(0, 1)])),
    (200, 129, 72, F32, 2, 2, dict(params=SKIPPING, causal=True, return_stats=True)),
    (65, 65, 256, F16, 2, 1, dict(params=TOPK, skipped="pooled")),
    (200, 200, 128, BF16, 4, 2, dict(params=PER_HEAD, order="per head", key_padding_mask=True, return_stats=True)),
    (200, 200, 128, F16, 4, 2, dict(params=PER_HEAD, order="one", skipped="pooled", layout="BNHD")),
    (129, 300, 64, F16, 4, 1, dict(params=SKIPPING, key_padding_mask=True, skipped="pooled", causal=True)),
    (200, 200, 33, F32, 2, 2, dict(params=CDF, layout="BNHD", key_padding_mask=True)),
    (129, 300, 128, F16, 2, 2, dict(block_map=True, key_padding_mask=True)),
    (200, 200, 64, BF16, 2, 1, dict(block_map=True, causal=True, skipped="pooled", pv_threshold=2.0)),
    (129, 300, 64, F16, 2, 1, dict(params=CDF, key_bias=True)),
    (200, 200, 128, BF16, 2, 2, dict(params=TOPK, key_bias=True, key_padding_mask=True, skipped="pooled")),
    (200, 200, 64, F16, 2, 2, dict(block_map=True, key_bias=True)),
    (200, 200, 72, BF16, 4, 2, dict(params=PER_HEAD, residual=True, return_lse=True, order="per head", layout="BNHD")),
    (129, 300, 128, F16, 2, 1, dict(params=CDF, residual=True, return_lse=True, skipped="pooled", causal=True)),
]


def call_variant(q_tokens, k_tokens, dim, dtype, heads, kv_heads, call, pv_dtype):
    q, k, v = drifting_qkv(2, heads, q_tokens, dim, k_tokens=k_tokens, kv_heads=kv_heads, dtype=dtype, device="cuda")
    call = dict(call, pv_dtype=pv_dtype, impl="triton")
    if "key_padding_mask" in call:
        call["key_padding_mask"] = torch.arange(k_tokens, device="cuda").expand(2, -1) % 3 == 1
    if "key_bias" in call:
        far = torch.arange(k_tokens, device="cuda") > 250
        call["key_bias"] = torch.randn(2, k_tokens, device="cuda").masked_fill(far, -1e30)
    if "order" in call:
        order = torch.arange(k_tokens, device="cuda", dtype=torch.int32)
        call["order"] = order.flip(0) if call["order"] == "one" else torch.stack([order.roll(7 * i)
                                                                                  for i in range(kv_heads)])
    if call.pop("block_map", False):
        counts = block_shape(q, pv_dtype=pv_dtype, impl="triton").counts(q_tokens, k_tokens)
        mask = (torch.arange(math.prod(counts), device="cuda") % 3 > 0).view(1, 1, *counts)
        block_sparse_attention(q, k, v, mask, **call)
        return
    call["params"] = call["params"].to("cuda")
    residual = call.pop("residual", False)
    of_the_map = {name: x for name, x in call.items()
                  if name not in ("skipped", "return_stats", "return_lse", "layout")}
    if "--without-maps" not in sys.argv:
        block_map(q, k, **of_the_map)
    if call.get("layout") == "BNHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if residual:
        made = {name: x for name, x in call.items() if not name.startswith("return_")}
        call["residual"] = attention_residual(q, k, v, torch.zeros_like(q), **made)
    sparge_attention(q, k, v, **call)


def main():
    for variant in VARIANTS:
        for pv_dtype in PV_FORMATS:
            call_variant(*variant, pv_dtype)
    # Heads and addresses that allow no 16-byte loads.
    q, k, v = drifting_qkv(1, 2, 130, 64, dtype=F16, device="cuda")
    apart = [torch.nn.functional.pad(x.flatten(2), (0, 3))[..., :-3].unflatten(2, (130, 64)) for x in (q, k, v)]
    sparge_attention(*apart, params=CDF, pv_dtype="fp16", impl="triton")
    torch.cuda.synchronize()
    print("every call finished")


if __name__ == "__main__":
    main()

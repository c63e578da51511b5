"""Small calls of every kind, to run under compute-sanitizer: `compute-sanitizer python sanitized_calls.py`."""
import itertools

import torch

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels.harness import PV_FORMATS


def main():
    for (n, dim), pv_dtype in itertools.product(((1, 64), (129, 72), (200, 128), (65, 256)), PV_FORMATS):
        q, k, v = drifting_qkv(2, 2, n, dim, kv_heads=1, dtype=torch.float16, device="cuda")
        padding = torch.arange(n, device="cuda").expand(2, -1) % 3 == 1
        order = torch.arange(n, device="cuda", dtype=torch.int32).flip(0)
        for call in (dict(params=SpargeParams(topk=0.5), skipped="pooled", order=order, key_padding_mask=padding),
                     dict(params=SpargeParams(cdf_threshold=0.7, pv_threshold=2.0), causal=True, return_stats=True)):
            sparge_attention(q, k, v, pv_dtype=pv_dtype, impl="triton", **call)
        sparge_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout="BNHD", pv_dtype=pv_dtype,
                         impl="triton", sink_keys=[(0, 1)], dense_queries=[(0, 1)])
    torch.cuda.synchronize()
    print("every call finished")


if __name__ == "__main__":
    main()

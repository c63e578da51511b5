"""One of two processes whose heads change places by their costs: `python -m … KIND MEETING RANK`.

KIND: yunchang, registered (the same, made by the name of its type), xfuser (with joint tensors) or diffusers. MEETING:
address at which the processes meet, as torch.distributed takes it. Prints a line, "found" and JSON: of each call of
three steps of two layers, the mean share of blocks that this process's heads kept, and whether the result is the one of
heads that stay; and the counts of the calls.
"""
import functools
import json
import sys

import torch
import torch.distributed as dist

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels.integrations.libraries import DEVICE, IMPL, long_context_attention
from comfyui_spargeattn.tests.kernels.integrations.pair import leave, meet

SETTINGS = dict(params=SpargeParams(cdf_threshold=0.9, similarity_threshold=-1.0), min_tokens=500, impl=IMPL)
HEADS, TOKENS, LAYERS, STEPS = 16, 1024, 2, 3


def layers(rank, kv_heads):
    """q, k, v (1, TOKENS / 2, heads, 32) of this process and of each layer. The second's heads are turned round."""
    made = drifting_qkv(1, HEADS, TOKENS, 32, kv_heads=kv_heads, device=DEVICE)
    q, k, v = (x.transpose(1, 2).chunk(2, 1)[rank].contiguous() for x in made)
    return [(q, k, v), tuple(x.flip(2) for x in (q, k, v))]


def of_yunchang(kind):
    """Two calls of an attention that layers share, of heads that stay and that move, and the latter's processor."""
    from yunchang import set_seq_parallel_pg
    from yunchang.kernels import AttnType

    from comfyui_spargeattn.kernels.integrations import yunchang as integration

    set_seq_parallel_pg(2, 1, dist.get_rank(), 2)
    made = long_context_attention("xfuser" if kind == "xfuser" else "yunchang")
    processor = integration.SpargeProcessor(**SETTINGS)
    stays, moves = (made(attn_type=integration.ATTN_TYPE, attn_processor=processor) for _ in range(2))
    if kind == "registered":
        processor = integration.register(layers=LAYERS, **SETTINGS)
        moves = made(attn_type=AttnType["SPARGEATTN"])
    else:
        integration.balance_heads(moves, LAYERS)
    if kind != "xfuser":
        return [stays, moves], processor
    words = drifting_qkv(1, HEADS, 64, 32, kv_heads=HEADS // 2, device=DEVICE, seed=1)
    joint = {f"joint_tensor_{name}": x.transpose(1, 2) for name, x in zip(("query", "key", "value"), words)}
    joined = [functools.partial(attention, None, joint_strategy="rear", **joint) for attention in (stays, moves)]
    return joined, processor


def of_diffusers(kind):
    """The same of diffusers' backends."""
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.models import attention_dispatch

    from comfyui_spargeattn.kernels.integrations import diffusers as integration

    config = ContextParallelConfig(ulysses_degree=2)
    mesh = dist.device_mesh.init_device_mesh(DEVICE, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(dist.get_rank(), 2, torch.device(DEVICE, dist.get_rank()), mesh=mesh)
    made = {"stays": 0, "moves": LAYERS}
    backends = [integration.register(name, layers=n, **SETTINGS) for name, n in made.items()]
    return [functools.partial(attention_dispatch.dispatch_attention_fn, backend=name, parallel_config=parallel)
            for name in made], backends[1]


def main(kind: str, meeting: str, rank: int) -> None:
    meet(meeting, rank)
    (stays, moves), attention = (of_diffusers if kind == "diffusers" else of_yunchang)(kind)
    kv_heads = HEADS if kind == "diffusers" else HEADS // 2  # its context parallelism takes no grouped heads
    found = []
    with torch.no_grad():
        for _ in range(STEPS):
            for inputs in layers(rank, kv_heads):
                expected = stays(*inputs)
                same = torch.equal(moves(*inputs), expected)
                found.append({"same": same, "kept": attention.kept.mean().item()})
    print("found", json.dumps({"calls": found, "counts": dict(attention.calls)}))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

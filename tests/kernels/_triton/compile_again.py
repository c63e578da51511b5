"""Which kernels compile again for another length, batch, number of heads, threshold or scale: a JSON list of names.

`python compile_again.py sm90`. Needs no GPU; like compile_all.py it runs in a process of its own.
"""
import json
import sys

import torch
import triton
from compiler import CompileOnlyDriver
from triton.runtime.jit import JITFunction

from comfyui_spargeattn.kernels._triton import pipeline
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds


def launch(n=1000, heads=4, batch=1, tau=0.9, theta=0.5, scale=None, everything=False):
    """The launches of a call; with `everything`, of one that uses every optional tensor."""
    q = torch.zeros(batch, heads, n, 64, dtype=torch.bfloat16)
    k = torch.zeros(batch, 2, n, 64, dtype=torch.bfloat16)
    call, per_head = {}, None
    if everything:
        per_head = torch.zeros(3, heads)
        call = dict(key_padding_mask=torch.zeros(batch, n, dtype=torch.bool), key_bias=torch.zeros(batch, n),
                    order=torch.zeros(n, dtype=torch.int32), sink_keys=[(0, 1)], dense_queries=[(0, 1)],
                    skipped="pooled")
    thresholds = Thresholds("cdf", (tau, theta, float("inf")), per_head)
    pipeline.attention(q, k, k, torch.empty_like(q), None,
                       CallSpec(thresholds, scale=scale, pv_dtype="fp16", return_stats=True, **call))


def main(arch):
    triton.runtime.driver.set_active(CompileOnlyDriver(arch))
    pipeline.arch_of = lambda device: arch
    compiled, run = [], JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        run(self, *args, grid=grid, warmup=True, **kwargs)  # returns nothing that could be launched

    JITFunction.run = compile_instead
    triton.knobs.runtime.jit_cache_hook = lambda **event: compiled.append(event["fn"].name)
    again = []
    for everything in (False, True):
        for theta in (0.5, -1.0):  # with similarity and, where the judge is off, without
            launch(theta=theta, everything=everything)
        assert compiled, "the hook did not see the first compilations"
        compiled.clear()
        for n in (1, 15, 16, 17, 64, 128, 1001, 1024, 4097):
            launch(n, everything=everything)
        for heads, batch in ((2, 1), (6, 3), (16, 2), (32, 1)):
            launch(heads=heads, batch=batch, everything=everything)
        for tau, theta, scale in ((0.99, 0.5, None), (0.5, -1.0, 1.0), (0.25, 1.0, 16.0), (0.125, 0.0, 0.0)):
            launch(tau=tau, theta=theta, scale=scale, everything=everything)
        again += compiled
        compiled.clear()
    print(json.dumps(again))


if __name__ == "__main__":
    main(sys.argv[1])

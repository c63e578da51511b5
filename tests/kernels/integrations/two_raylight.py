"""One of two processes that share an attention call by raylight's own function: `python -m … KIND MEETING RANK`.

KIND: ulysses, with the heads spread by their costs, or ring. RAYLIGHT_PATH: a checkout of raylight. MEETING: address at
which the processes meet, as torch.distributed takes it. Prints a line, "found" and JSON: relative L1 of this process's
part, as the models of raylight call for it, and the counts of the calls.
"""
import json
import os
import sys

import torch
from yunchang import set_seq_parallel_pg

from comfyui_spargeattn.kernels import SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.kernels.integrations.yunchang import register
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels.integrations.libraries import DEVICE, IMPL, long_context_attention
from comfyui_spargeattn.tests.kernels.integrations.pair import leave, meet

PARAMS = SpargeParams(cdf_threshold=0.9, similarity_threshold=-1.0)
HEADS, TOKENS, TEXT, DIM = 8, 1024, 64, 32


def main(kind: str, meeting: str, rank: int) -> None:
    meet(meeting, rank)
    set_seq_parallel_pg(*((2, 1) if kind == "ulysses" else (1, 2)), rank, 2)
    long_context_attention("xfuser")  # before raylight imports it, which takes a GPU for granted
    processor = register(layers=1 if kind == "ulysses" else 0, params=PARAMS, min_tokens=500, impl=IMPL)
    sys.path.insert(0, f"{os.environ['RAYLIGHT_PATH']}/src")
    from raylight.distributed_modules.attention import make_xfuser_attention

    attention = make_xfuser_attention("SPARGEATTN", True)
    q, k, v = drifting_qkv(1, HEADS, TOKENS, DIM, device=DEVICE)
    words = drifting_qkv(1, HEADS, TEXT, DIM, device=DEVICE, seed=1)
    mine = [x.chunk(2, 2)[rank] for x in (q, k, v)]
    one = sparge_attention(q, k, v, params=PARAMS, impl=IMPL).chunk(2, 2)[rank]
    with torch.no_grad():
        flat = attention(*(x.transpose(1, 2).flatten(2) for x in mine), HEADS)
        split = attention(*mine, HEADS, skip_reshape=True, skip_output_reshape=True)
        found = {"flat": relative_l1(flat, one.transpose(1, 2).flatten(2)), "split": relative_l1(split, one)}
        if kind == "ulysses":  # as models with text beside the picture; every process has all of the text
            processor.params = SpargeParams(topk=1.0)
            joint = attention(*mine, HEADS, *words, skip_reshape=True, skip_output_reshape=True)
            picture, text = dense_attention(*map(torch.cat, zip((q, k, v), words), (2, 2, 2))).split([TOKENS, TEXT], 2)
            found["joint"] = relative_l1(joint, torch.cat([picture.chunk(2, 2)[rank], text], 2))
    print("found", json.dumps(found | {"calls": dict(processor.calls)}))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

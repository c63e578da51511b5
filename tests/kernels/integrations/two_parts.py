"""One of two processes that share an attention call by yunchang: `python -m … KIND MEETING RANK`.

KIND: yunchang or xfuser, and ulysses or ring, such as yunchang-ring. MEETING: address at which the processes meet, as
torch.distributed takes it. Prints a line, "found" and JSON: relative L1 of this process's part of the tokens, and the
counts of the sparse call.
"""
import json
import sys

import torch
from yunchang import set_seq_parallel_pg

from comfyui_spargeattn.kernels import sparge_attention
from comfyui_spargeattn.kernels.integrations.yunchang import ATTN_TYPE, SpargeProcessor
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.kernels.integrations.libraries import IMPL, long_context_attention
from comfyui_spargeattn.tests.kernels.integrations.pair import leave, meet
from comfyui_spargeattn.tests.kernels.integrations.test_yunchang import ALL, HALF, inputs


def main(kind: str, meeting: str, rank: int) -> None:
    meet(meeting, rank)
    library, _, kind = kind.partition("-")
    set_seq_parallel_pg(*((2, 1) if kind == "ulysses" else (1, 2)), rank, 2)
    q, k, v, dense = inputs()
    one = sparge_attention(q, k, v, params=HALF, layout="BNHD", impl=IMPL)
    part = [x.chunk(2, 1)[rank].contiguous() for x in (q, k, v)]
    part = [None, *part] if library == "xfuser" else part
    processor = SpargeProcessor(params=HALF, min_tokens=500, impl=IMPL)
    attention = long_context_attention(library)(attn_type=ATTN_TYPE, attn_processor=processor)
    with torch.no_grad():
        sparse = attention(*part)
        calls = dict(processor.calls)
        processor.params = ALL
        every = attention(*part)
    of_dense, of_one = (x.chunk(2, 1)[rank] for x in (dense, one))
    print("found", json.dumps({"sparse": relative_l1(sparse, of_dense), "every block": relative_l1(every, of_dense),
                               "against one process": relative_l1(sparse, of_one), "calls": calls}))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

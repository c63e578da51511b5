"""One of two processes that share a model by diffusers' context parallelism: `python -m … KIND MEETING RANK`.

KIND: ulysses or ring. MEETING: address at which the processes meet, as torch.distributed takes it. The first process
prints one line, "found" and JSON: relative L1 of several runs, and the counts of the sparse one.
"""
import json
import sys
from unittest import mock

import torch
from diffusers import ContextParallelConfig

from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.kernels.integrations.libraries import DEVICE
from comfyui_spargeattn.tests.kernels.integrations.pair import leave, meet
from comfyui_spargeattn.tests.kernels.integrations.test_diffusers import ALL, evaluate, small_model, sparse


def main(kind: str, meeting: str, rank: int) -> None:
    cuda = DEVICE == "cuda"
    meet(meeting, rank)
    model = small_model()
    native = evaluate(model)
    sparse(model)
    one = evaluate(model)
    backend = sparse(model)
    # diffusers numbers processes by their accelerators, and a CPU counts none.
    with mock.patch("torch.accelerator.device_count", lambda: torch.cuda.device_count() if cuda else 1):
        model.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": 2}))
    two = evaluate(model)
    found = {"one": relative_l1(one, native), "two": relative_l1(two, native), "between": relative_l1(two, one),
             "calls": dict(backend.calls)}
    backend.params = ALL
    found["every block"] = relative_l1(evaluate(model), native)
    backend.min_tokens = 10_000
    found["dense"] = relative_l1(evaluate(model), native)
    if rank == 0:
        print("found", json.dumps(found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

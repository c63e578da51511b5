"""Host time of a call: PyTorch's attention, the kernels alone, and the kernels through the override that ComfyUI calls.

The host needs as long for short sequences as for long ones, so all calls here are over 2048 tokens: the device keeps
pace, and no launch waits for room in the queue.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.call.token_layout import KEY, Expectation
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from tests.bench.measure import host_us
from tests.cases import video_qkv
from tests.nodes.stand_ins import sample

_GRID = 1, 32, 64
_PARAMS = SpargeParams(cdf_threshold=0.95, similarity_threshold=-1.0)


def host(cases: dict[str, dict], repeats: int) -> list[dict]:
    """One row for each case's batch, heads and head_dim, in microseconds a call.

    sdpa: PyTorch's. bare, statistics: `sparge_attention` without and with statistics. override: a call of a model,
    through the pack's override, which collects statistics and time. per_head: the same with thresholds for each head.
    """
    rows = []
    for case, shape in cases.items():
        q, k, v = video_qkv(grid=_GRID, heads=shape["heads"], dim=shape["dim"], batch=shape.get("batch", 1))
        per_head = SpargeParams(cdf_threshold=q.new_full((shape["heads"],), 0.95), similarity_threshold=-1.0)
        calls = dict(sdpa=partial(F.scaled_dot_product_attention, q, k, v),
                     bare=partial(sparge_attention, q, k, v, params=_PARAMS),
                     statistics=partial(sparge_attention, q, k, v, params=_PARAMS, return_stats=True))
        row = {name: _median(run, repeats) for name, run in calls.items()}
        for name, params in dict(override=_PARAMS, per_head=per_head).items():
            row[name] = _through_override(q, k, v, params, repeats)
        rows.append(dict(case=case) | row)
    return rows


def _median(run: Callable, repeats: int) -> float:
    return statistics.median(host_us(run) for _ in range(repeats))


def _through_override(q: Tensor, k: Tensor, v: Tensor, params: SpargeParams, repeats: int) -> float:
    """A call in the form of a model's transformer block, inside a sampling run."""
    override = SpargeOverride(NodeSettings(params, start_percent=0.0), show=lambda text: None)
    found = []

    def evaluate(options: dict) -> None:
        def model(x, t, c_concat, c_crossattn, control, transformer_options):
            run = partial(options[SLOT], F.scaled_dot_product_attention, q, k, v, q.shape[1], skip_reshape=True,
                          transformer_options=transformer_options)
            found.append(_median(run, repeats))

        # A model numbers its transformer blocks. Without, each call here would be a block whose map the report wants.
        told = {KEY: Expectation(_GRID), "cond_or_uncond": [0], "block_type": "double", "block_index": 0}
        override.names.count(model, q, q, transformer_options=options | told)

    sample(override, evaluate, steps=1)
    assert override.run.summary.sparse > 100 * repeats, override.run.summary
    return found[0]

"""What mixing the channels of Q and K before INT8 is worth on real attention: `python -m tests.bench.bench_mixing`.

For the calls of the sources of `bench_real`, it prints the error that INT8 makes of the scores, weighted by probability
(a constant of a row does not count), root mean square over rows, heads and layers, in natural-log units: as they are,
and as a factor with mixed channels. It needs no GPU. A source whose files are missing is left out.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.kernels.reference import _blocks, _int8, _mixed
from tests.bench.bench_real import SEEDS, SHORTER, demo, photographs, structured, text
from tests.bench.replay import Call
from tests.cases import video_qkv

BLOCK_K, GROUPS = 64, 8
ROWS, KEYS = 512, 6016  # of a call, at most


def score_errors(call: Call, groups: int) -> Tensor:
    """The error of each head (B, H), with channels mixed in `groups`; 1 for none."""
    q, k = call.q.float(), call.k.float().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    rows = torch.arange(0, q.shape[2], max(1, q.shape[2] // ROWS))
    q, k = q[:, :, rows], (k - k.mean(2, keepdim=True))[:, :, :KEYS]
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.mT
    rounded_k = _int8(_blocks(_mixed(k, groups), BLOCK_K), (-2, -1)).flatten(2, 3)[:, :, :k.shape[2]]
    error = _int8(_mixed(q, groups), (-1,)) @ rounded_k.mT - scores
    if call.causal:
        scores = scores.masked_fill(rows[:, None] < torch.arange(k.shape[2]), -torch.inf)
    weights = scores.softmax(-1)
    variance = (weights * error.square()).sum(-1) - (weights * error).sum(-1).square()
    return variance.clamp(min=0).mean(-1).sqrt()


def compare(calls: Iterable[Call]) -> tuple[float, float, float]:
    """The error as it is, the factor with mixed channels, and the factor of the head that gains least."""
    plain, mixed = (torch.cat([score_errors(call, groups).flatten() for call in calls]) for groups in (1, GROUPS))
    return (rms(plain), rms(mixed) / rms(plain), (mixed / plain).max().item())


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a plain text, or Rdata.rdb of R's janeaustenr, for SmolLM2")
    args = parser.parse_args()
    on = "cpu", torch.float32
    sources = {"demo model": demo(SHORTER, *on), "DINOv2, 518²": photographs(518, *on),
               "structured, head_dim 128": structured(2, *on),
               "structured, head_dim 64": ([Call(*video_qkv((1, 64, 64), 6, 64, text=154, device="cpu", seed=seed))]
                                           for seed in SEEDS)}
    if args.text is not None:
        sources["SmolLM2"] = text(args.text, 2048, *on)
    for name, inputs in sources.items():
        try:
            for calls in inputs:
                error, factor, worst = compare(calls)
                print(f"{name}: {error:.4f}, mixed {factor:.2f} x, worst head {worst:.2f} x", flush=True)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()

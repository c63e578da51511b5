"""Measure what better block scores would be worth: `python -m tests.bench.bench_scores --out scores.json`.

For every order and judge, PyTorch builds a map from each of four scores, and the kernels attend over the given map:
- mean: q̄·k̄, from which the kernels predict.
- k2: adds ½ q̄²·var(K_j), the second order of log E[exp(q·k)] over the keys of a block.
- qk2: adds the second order over the queries of a block as well.
- oracle: the true share of each block, averaged over the queries of the block.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import block_shape, block_sparse_attention
from comfyui_spargeattn.nodes.demo.words import prompt
from tests.assertions import relative_l1
from tests.bench.bench_orders import GRID, JUDGES, WORDS, Call, demo_calls, largest_sparsity, orders
from tests.cases import video_qkv
from tests.demo import compare
from tests.demo.model import WEIGHTS, load, scaled_dot_product

SCORES = ("mean", "k2", "qk2", "oracle")


def blocks_of(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (B, H, n, D) and self-similarity (B, H, n) of the blocks of x (B, H, N, D)."""
    pad = -x.shape[2] % block
    count = x.new_full((-(-x.shape[2] // block), 1), block)
    count[-1] = block - pad

    def mean(y):
        return torch.nn.functional.pad(y, (0, 0, 0, pad)).unflatten(2, (-1, block)).sum(3) / count

    centre, unit = mean(x), mean(x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return centre, mean(x.square()) - centre.square(), unit.square().sum(-1)


def shares(q: Tensor, k: Tensor, block) -> Tensor:
    """Log of each key block's true share, averaged over the queries of a block: (B, H, q_blocks, k_blocks)."""
    columns = torch.arange(k.shape[2], device=k.device) // block.k
    rows = []
    for start in range(0, q.shape[2], block.q):
        p = (q[:, :, start:start + block.q] @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(2)
        rows.append(p.new_zeros(*p.shape[:2], int(columns[-1]) + 1).index_add_(2, columns, p))
    return torch.stack(rows, 2).clamp(min=1e-30).log()


def scores_of(call: Call, order: Tensor | None, block, names=SCORES) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Scores (B, H, q_blocks, k_blocks) in natural-log units by name, similarity of the blocks of Q and of K."""
    q, k = (x.float() if order is None else x[:, :, order.long()].float() for x in call[:2])
    k = k - k.mean(2, keepdim=True)
    scale = q.shape[-1] ** -0.5
    (q_mean, q_var, q_alike), (k_mean, k_var, k_alike) = blocks_of(q, block.q), blocks_of(k, block.k)
    found = {"mean": q_mean @ k_mean.mT * scale}
    found["k2"] = found["mean"] + 0.5 * scale ** 2 * (q_mean.square() @ k_var.mT)
    found["qk2"] = found["k2"] + 0.5 * scale ** 2 * (q_var @ (k_mean.square() + k_var).mT)
    if "oracle" in names:
        found["oracle"] = shares(q, k, block)
    return found, q_alike, k_alike


def top_cdf(scores: Tensor, q_alike: Tensor, k_alike: Tensor, theta: float, tau: float) -> Tensor:
    """The block map, bool (B, H, q_blocks, k_blocks), by the rules of `reference.predict_map`."""
    always = (k_alike < theta)[:, :, None]
    p = scores.masked_fill(always, float("-inf")).softmax(-1).nan_to_num(0.0)
    ranked, index = p.sort(-1, descending=True)
    chosen = torch.empty_like(p, dtype=torch.bool).scatter_(-1, index, ranked.cumsum(-1) - ranked < tau)
    return chosen & (p > 0) | always | (q_alike < theta)[..., None]


def sparsity_at_error(calls, dense, prepared, name, order, theta, pv_dtype) -> float:
    """Largest mean sparsity, over one τ for all calls, whose mean L1 is below the target."""
    def at(tau: float) -> tuple[float, float]:
        masks = [top_cdf(scores[name], q, k, theta, tau) for scores, q, k in prepared]
        outs = [block_sparse_attention(*call, mask, order=order, pv_dtype=pv_dtype) for call, mask in zip(calls, masks)]
        l1 = sum(map(relative_l1, outs, dense)) / len(calls)
        return l1, 1 - torch.stack([mask.float().mean() for mask in masks]).mean().item()

    return largest_sparsity(at, 8)


def measure(inputs: str, calls: list[Call], device: str) -> list[dict]:
    """One row for each order and score."""
    dense, rows = [scaled_dot_product(*call) for call in calls], []
    for pv_dtype in ("fp16", "int8"):  # their block shapes differ
        block = block_shape(calls[0][0], pv_dtype=pv_dtype)
        for label, order in orders(device).items():
            if label == "random":
                continue
            prepared = [scores_of(call, order, block) for call in calls]
            for name in SCORES:
                row = dict(inputs=inputs, block=f"{block.q}×{block.k}", order=label, score=name)
                for theta in JUDGES:
                    row[f"skipped θ={theta:g}"] = sparsity_at_error(calls, dense, prepared, name, order, theta,
                                                                    pv_dtype)
                rows.append(row)
                print(row, flush=True)
    return rows


def boundary(device: str) -> list[dict]:
    """A call whose text follows the visual tokens, with a block that holds both and without such a block."""
    rows = []
    for pv_dtype in ("fp16", "int8"):
        call = video_qkv((28, 30, 26), 24, 128, text=256)
        block = block_shape(call[0], pv_dtype=pv_dtype)
        visual = 28 * 30 * 26
        for label, first in (("mixed", 0), ("split", visual % 128)):
            part = [x[:, :, first:].contiguous() for x in call]
            prepared = [scores_of(part, None, block, ("mean",))]
            row = dict(text_boundary=label, block=f"{block.q}×{block.k}", tokens=part[0].shape[2])
            for theta in JUDGES:
                row[f"skipped θ={theta:g}"] = sparsity_at_error([part], [scaled_dot_product(*part)], prepared, "mean",
                                                                None, theta, pv_dtype)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    device, words = "cuda", prompt(*WORDS)
    model = load(WEIGHTS, device, torch.bfloat16)
    clip = compare.generate(model, "dense", None, words, GRID, 20, 0, 0).latent
    rows = boundary(device)
    rows += measure("demo model", demo_calls(model, words, clip), device)
    rows += measure("structured", [video_qkv(GRID, 4, 128)], device)
    if args.out:
        args.out.write_text(json.dumps(dict(card=torch.cuda.get_device_name(), rows=rows), indent=1))


if __name__ == "__main__":
    main()

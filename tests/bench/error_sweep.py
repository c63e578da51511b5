"""Time against error over settings, formats of P·V and seeds of the inputs, beside the installed peers."""
from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from tests.bench.measure import device_ms, error
from tests.bench.peers import Method, cudnn, fixed_share, installed_peers, ours
from tests.cases import video_qkv

FORMATS = ("int8", "fp16")
SEEDS = (11, 12, 13)
L1_LIMIT = 0.05
_LONG = 40_000  # tokens; from here on few settings are measured


def settings(n: int) -> Iterator[tuple[str, SpargeParams, str]]:
    """(name, params, skipped) for `n` tokens."""
    yield "all blocks", fixed_share(1.0), "drop"
    shares = (0.4, 0.3, 0.25, 0.2, 0.15, 0.1) if n > _LONG else [x / 100 for x in range(50, 5, -5)]
    cdfs = (0.9, 0.8) if n > _LONG else (0.98, 0.95, 0.9, 0.85, 0.8)
    params = {f"topk {share}": fixed_share(share) for share in shares}
    params |= {f"cdf {cdf}": SpargeParams(cdf_threshold=cdf, similarity_threshold=-1.0) for cdf in cdfs}
    for name, each in params.items():
        if n <= _LONG:
            yield name, each, "drop"
        yield f"{name}, pooled", each, "pooled"


def error_against_time(cases: dict[str, dict], repeats: int) -> list[dict]:
    """A row for each case, seed and method. `best` marks the fastest of ours and of the sparse peers whose relative L1
    against cuDNN's attention of the same tensors is at most 0.05. Sparse peers are those without a gate."""
    rows = []
    for case, shape in cases.items():
        for seed in SEEDS:
            q, k, v = video_qkv(**shape, seed=seed)
            dense, found = cudnn(q, k, v), []
            methods = installed_peers() + [
                Method(f"ours {pv_dtype} {name}", ours(params, pv_dtype, skipped=skipped), pv_dtype, params, skipped)
                for name, params, skipped in settings(q.shape[2]) for pv_dtype in FORMATS]
            for method in methods:
                run, row = partial(method.run, q, k, v), dict(case=case, seed=seed, method=method.name)
                try:
                    row |= error(run(), dense) | dict(ms=device_ms(run, repeats))
                    if method.params is not None:
                        _, stats = sparge_attention(q, k, v, params=method.params, pv_dtype=method.gate,
                                                    skipped=method.skipped, impl="triton", return_stats=True)
                        row["kept"] = stats.kept.mean().item()
                except Exception as problem:  # a peer may raise anything
                    row["error"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
                found.append((method, row))
            for sparse in (lambda x: x.params is not None, lambda x: x.gate is None):
                good = [row for method, row in found if sparse(method) and row.get("L1", 1.0) <= L1_LIMIT]
                if good:
                    min(good, key=lambda row: row["ms"])["best"] = True
            rows += [row for _, row in found]
            del q, k, v, dense
            torch.cuda.empty_cache()
    return rows


def best(rows: list[dict]) -> list[dict]:
    """For each case, in milliseconds over the seeds, median and worst: the fastest of ours and of the sparse peers
    within the limit of error, the dense peers, and the names of what was fastest."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case and "ms" in row]
        groups = {"ours": lambda row: row.get("best") and row["method"].startswith("ours"),
                  "sparse peer": lambda row: row.get("best") and not row["method"].startswith("ours")}
        groups |= {name: lambda row, name=name: row["method"] == name
                   for name in ("SDPA cuDNN", "FlashAttention-3", "comfy-kitchen int8", "ours int8 all blocks")}
        line = dict(case=case)
        for name, belongs in groups.items():
            chosen = [row for row in mine if belongs(row)]
            if chosen:
                ms = [row["ms"] for row in chosen]
                line[name] = f"{statistics.median(ms):.3f} / {max(ms):.3f}"
                if "best" in chosen[0]:
                    line[f"{name} was"] = ", ".join(dict.fromkeys(row["method"] for row in chosen))
        found.append(line)
    return found

"""A video model and an attention call on one GPU and on two: errors between them, times and speed-up.

    NCCL_NVLS_ENABLE=0 python -m comfyui_spargeattn.tests.gpu.two_gpus [--out FILE]

needs diffusers and yunchang on the path; xfuser 0.4.4 or 0.4.5 is measured too where it is. Two processes, NCCL:

- diffusers' Wan transformer in the shape of Wan 2.1 1.3B at 480p (30 layers, 12 heads of 128, 21×30×52 = 32760 tokens,
  bf16, random weights), dense and with SpargeAttn, by context parallelism: by heads (Ulysses) and as a ring.
- the attention call of that shape, of heads that differ, through yunchang's and xDiT's attention.

Prints a table and one JSON object, and fails where an error is above its bound. `--device cpu --tiny` runs the same
code on a CPU, with gloo, the reference and a small shape. `--layers` shortens the model.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import video_qkv

ALL = SpargeParams(topk=1.0)
TOPK = {"topk 0.5": SpargeParams(topk=0.5), "topk 0.3": SpargeParams(topk=0.3)}
# Relative L1. By heads, two GPUs compute the same maps: what is left is the rounding of the model's other layers.
BOUNDS = {"ulysses": 0.02, "every block": 0.06}
RING = 1.5  # times the error of one GPU against dense attention: a ring selects from each half of the keys by itself


@dataclass(frozen=True)
class Setup:
    """Where a run takes place, and at which size."""

    rank: int
    device: torch.device
    grid: tuple[int, int, int]  # tokens
    heads: int
    dim: int
    layers: int
    ffn: int
    repeats: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def settings(self) -> dict:
        """Of the integrations: short calls go sparse too, and a CPU has the reference alone."""
        return dict(min_tokens=256, impl="triton" if self.cuda else "reference")

    def milliseconds(self, run: Callable) -> float:
        """Median time of a call after two to warm up: the slower process's, each begun together."""
        times = []
        for i in range(self.repeats + 2):
            dist.barrier()
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                run()
                end.record()
                end.synchronize()
                spent = start.elapsed_time(end)
            else:
                start = time.perf_counter()
                run()
                spent = (time.perf_counter() - start) * 1e3
            if i > 1:
                times.append(spent)
        slowest = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return round(slowest.item(), 3)


# ---- diffusers: a model


def build(setup: Setup):
    """The same random Wan transformer at every call."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with setup.device:
        model = WanTransformer3DModel(num_attention_heads=setup.heads, attention_head_dim=setup.dim,
                                      ffn_dim=setup.ffn, num_layers=setup.layers, text_dim=256)
    return model.to(setup.dtype).eval()


def evaluation(setup: Setup, model) -> Callable[[], Tensor]:
    """An evaluation of the model, of a smooth latent, as a latent is in most steps of a run."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = setup.grid
    coarse = torch.randn(1, 16, max(2, t // 4), max(2, h // 4), max(2, w // 4), generator=generator)
    latent = F.interpolate(coarse, (t, 2 * h, 2 * w), mode="trilinear")
    latent += 0.2 * torch.randn(latent.shape, generator=generator)
    text = torch.randn(1, 64, 256, generator=generator)
    latent, text = (x.to(setup.device, setup.dtype) for x in (latent, text))
    when = torch.tensor([500], device=setup.device)
    return torch.no_grad()(lambda: model(latent, when, text, return_dict=False)[0])


def measure_model(setup: Setup) -> dict:
    """name of the attention → where → times, speed-up and errors."""
    from diffusers import ContextParallelConfig

    from comfyui_spargeattn.kernels.integrations import diffusers as integration

    found, outputs = {}, {}
    for where in ("one", "ulysses", "ring"):
        model = build(setup)
        run = evaluation(setup, model)
        backend = integration.register(params=ALL, **setup.settings)
        model.set_attention_backend("spargeattn")
        if where != "one":
            # diffusers numbers processes by their accelerators, and a CPU counts none.
            on_cpu = mock.patch("torch.accelerator.device_count", lambda: 1)
            with nullcontext() if setup.cuda else on_cpu:
                model.enable_parallelism(config=ContextParallelConfig(**{f"{where}_degree": 2}))
        for name, params in {"dense": None, "every block": ALL, **TOPK}.items():
            if params is None and where == "ring":
                continue  # diffusers' native backend has no log-sum-exp
            model.set_attention_backend("native" if params is None else "spargeattn")
            backend.params = params or ALL
            backend.calls.clear()
            outputs[name, where] = run().float()
            facts = {"calls": dict(backend.calls), "ms": setup.milliseconds(run)}
            facts["L1 to dense"] = relative_l1(outputs[name, where], outputs["dense", "one"])
            if where != "one":
                facts["L1 to one"] = relative_l1(outputs[name, where], outputs[name, "one"])
                facts["speed-up"] = round(found[name]["one"]["ms"] / facts["ms"], 3)
            found.setdefault(name, {})[where] = facts
        del model, run
    return found


# ---- yunchang and xDiT: a call


def attention_classes() -> dict[str, type]:
    """name → the attention over several devices of each library that is there."""
    from yunchang import LongContextAttention

    found = {"yunchang": LongContextAttention}
    try:
        from xfuser.core.long_ctx_attention import xFuserLongContextAttention
        import xfuser.core.long_ctx_attention.ring  # noqa: F401 - newer ones than 0.4.5 don't fit yunchang 0.6.4
    except (ImportError, NotImplementedError, AttributeError) as error:
        print(f"xfuser is left out: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        if issubclass(xFuserLongContextAttention, LongContextAttention):  # not without a GPU
            found["xfuser"] = xFuserLongContextAttention
    return found


def measure_call(setup: Setup) -> dict:
    """name of the attention → where → times, speed-up and errors, of a call by itself."""
    from yunchang import set_seq_parallel_pg
    from yunchang.kernels import AttnType

    from comfyui_spargeattn.kernels.integrations.yunchang import ATTN_TYPE, SpargeProcessor

    q, k, v = video_qkv(setup.grid, setup.heads, setup.dim, dtype=setup.dtype, device=setup.device)
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    whole = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    mine = [x.chunk(2, 1)[setup.rank].contiguous() for x in whole]
    impl = setup.settings["impl"]

    def one(params):
        if params is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return sparge_attention(*whole, params=params, layout="BNHD", impl=impl)

    found, outputs = {}, {}
    for name, params in {"dense": None, "every block": ALL, **TOPK}.items():
        outputs[name] = one(params)
        found[name] = {"one": {"ms": setup.milliseconds(lambda params=params: one(params)),
                               "L1 to dense": relative_l1(outputs[name], dense)}}
    for where, degrees in (("ulysses", (2, 1)), ("ring", (1, 2))):
        set_seq_parallel_pg(*degrees, setup.rank, 2)
        for library, kind in attention_classes().items():
            for name, params in {"dense": None, "every block": ALL, **TOPK}.items():
                if params is None and where == "ring":
                    continue  # yunchang rounds the log-sum-exp of torch's attention to 16 bits
                processor = params and SpargeProcessor(params=params, **setup.settings)
                torch_type = AttnType.TORCH_FLASH if setup.cuda else AttnType.TORCH_MATH
                attention = kind(attn_type=ATTN_TYPE if processor else torch_type, attn_processor=processor)
                run = torch.no_grad()(lambda attention=attention, before=(None,) if library == "xfuser" else ():
                                      attention(*before, *mine))
                out = run()
                found[name][f"{library} {where}"] = {
                    "ms": setup.milliseconds(run), "calls": dict(processor.calls) if processor else {},
                    "L1 to dense": both(out, dense, setup), "L1 to one": both(out, outputs[name], setup)}
    for of_name in found.values():
        for where, facts in of_name.items():
            if where != "one":
                facts["speed-up"] = round(of_name["one"]["ms"] / facts["ms"], 3)
    return found


def both(part: Tensor, whole: Tensor, setup: Setup) -> float:
    """The larger relative L1 of the two processes' parts."""
    error = torch.tensor(relative_l1(part, whole.chunk(2, 1)[setup.rank]), device=setup.device)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


# ---- the processes


def faults(found: dict) -> list[str]:
    """What is above its bound."""
    wrong = []
    for part, of_part in found.items():
        for name, of_name in of_part.items():
            for where, facts in of_name.items():
                error = facts["L1 to dense"]
                if name == "every block" and not error <= BOUNDS["every block"]:
                    wrong.append(f"{part}, {name}, {where}: L1 to dense {error:.4g} > {BOUNDS['every block']}")
                if "ulysses" in where and not facts["L1 to one"] <= BOUNDS["ulysses"]:
                    wrong.append(f"{part}, {name}, {where}: L1 to one {facts['L1 to one']:.4g} > {BOUNDS['ulysses']}")
                if "ring" in where and not error <= RING * of_name["one"]["L1 to dense"] + 0.001:
                    wrong.append(f"{part}, {name}, {where}: L1 to dense {error:.4g} > {RING} × one GPU's")
                if name != "dense" and facts.get("calls", {"sparse": 1}).get("sparse", 0) == 0:
                    wrong.append(f"{part}, {name}, {where}: nothing went sparse: {facts['calls']}")
    return wrong


def table(found: dict) -> str:
    lines = ["| part | attention | where | ms | speed-up | L1 to one GPU | L1 to dense |", "|---|---|---|---|---|---|---|"]
    for part, of_part in found.items():
        for name, of_name in of_part.items():
            for where, facts in of_name.items():
                between = f"{facts['L1 to one']:.2g}" if "L1 to one" in facts else ""
                lines.append(f"| {part} | {name} | {where} | {facts['ms']:.2f} | {facts.get('speed-up', '')} | "
                             f"{between} | {facts['L1 to dense']:.2g} |")
    return "\n".join(lines)


def process(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """One of the two; the first one reports."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    setup = Setup(rank, device, (2, 16, 16), 4, 32, 2, 256, 2) if options.tiny else (
        Setup(rank, device, (21, 30, 52), 12, 128, options.layers, 8960, 5))
    dist.init_process_group("nccl" if setup.cuda else "gloo", init_method=meeting, world_size=2, rank=rank,
                            timeout=timedelta(seconds=120), device_id=device if setup.cuda else None)
    try:
        found = {"model": measure_model(setup), "call": measure_call(setup)}
        if rank == 0:
            cards = torch.cuda.get_device_name() if setup.cuda else "cpu"
            report = dict(device=f"2 × {cards}", torch=torch.__version__, grid=setup.grid, layers=setup.layers,
                          heads=setup.heads, dim=setup.dim, faults=faults(found), found=found)
            options.out.write_text(json.dumps(report, indent=1))
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--layers", type=int, default=30, help="of the model that is not tiny")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options.out = options.out or Path(folder) / "found.json"
        torch.multiprocessing.spawn(process, (f"file://{folder}/meeting", options), nprocs=2)
        report = json.loads(options.out.read_text())
    print(table(report["found"]))
    print(json.dumps(report))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if report["faults"]:
        sys.exit("\n".join(report["faults"]))


if __name__ == "__main__":
    main()

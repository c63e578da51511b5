"""The same clip with dense attention and with SpargeAttn: ``python -m tests.demo`` at the repository's root.

Prints a table and writes a side-by-side animation and a picture of the block maps. On a CPU, SpargeAttn runs as its
readable reference: that shows what it computes and how close it stays, not its speed.
"""

import argparse
import math
import os
from pathlib import Path

import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.demo.words import prompt

from . import pictures
from .compare import dense_share, generate, probe, psnr
from .model import WEIGHTS, load
from .progress import ProgressLine

HERE = Path(__file__).parent
START_PERCENT = 0.2  # the node's default: the first steps lay out the picture and stay dense
# cdf_threshold and similarity_threshold. At the CPU's small grid the default keeps nearly every block.
DEFAULT = (0.99, 0.5)
SETTINGS = [(0.98, 0.4), (0.95, 0.3)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "output", help="folder for the pictures")
    parser.add_argument("--grid", type=int, nargs=3, metavar=("T", "H", "W"), help="size of the clip in tokens")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--object", default="star red plain right", help="shape colour texture motion")
    parser.add_argument("--second", default="ring yellow plain left", help="the same for a second one, 4 x none for no")
    parser.add_argument("--background", default="blue checker left", help="colour texture pan")
    parser.add_argument("--comfyui", action="store_true",
                        help="through ComfyUI's loader, sampler and node; COMFYUI_PATH names ComfyUI's folder")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.comfyui and "COMFYUI_PATH" not in os.environ:
        raise SystemExit("--comfyui needs the environment variable COMFYUI_PATH to name ComfyUI's folder")
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    grid = tuple(args.grid) if args.grid else (21, 30, 52) if gpu else (9, 16, 20)
    steps = args.steps or (20 if gpu else 8)
    words = prompt(args.object, args.background, args.second)
    settings = [DEFAULT, *SETTINGS] if gpu else SETTINGS
    params = [SpargeParams(cdf_threshold=tau, similarity_threshold=theta) for tau, theta in settings]
    names = [f"SpargeAttn {tau:g} {theta:g}" for tau, theta in settings]
    print(f"{args.object}, {args.second}, over {args.background}; {math.prod(grid)} tokens, {steps} steps, {device}")

    model = load(WEIGHTS, device, dtype)
    if args.comfyui:
        from .in_comfyui import ComfyUI

        host, first = ComfyUI(WEIGHTS), START_PERCENT
        run = host.generate
    else:
        first = dense_share(steps, START_PERCENT)

        def run(*what):
            return generate(model, *what)

    line, runs = ProgressLine(1 + len(params), steps), []
    if gpu:  # compile and warm up outside the timed runs
        line.show("compiling the kernels")
        for p in [None, params[0]]:
            run("warm-up", p, words, grid, 2, args.seed, 0)
    for name, p in zip(["dense", *names], [None, *params]):
        line.begin(name)
        runs.append(run(name, p, words, grid, steps, args.seed, first, line.step))
        runs[-1].psnr = psnr(runs[-1].latent, runs[0].latent)
    line.show("comparing single calls")
    dense = runs[0]
    errors, maps = probe(model, words, dense.latent, params)
    line.show("")
    for one, error in zip(runs[1:], errors):
        one.l1 = error

    print(f"\n{'attention':26} {'tokens':>7} {'sparsity':>9} {'attention s':>12} {'total s':>8} {'PSNR dB':>8}"
          f" {'L1':>7}")
    for r in runs:
        attention = "-" if r.attention_seconds is None else f"{r.attention_seconds:.2f}"
        print(f"{r.name:26} {math.prod(grid):7} {1 - r.kept:9.1%} {attention:>12} {r.seconds:8.2f} "
              f"{r.psnr:8.1f} {r.l1:7.4f}")
    print("\nSpargeAttn A B: cdf_threshold A, similarity_threshold B."
          f"\nSparsity: share of block pairs skipped in the sparse steps (from {START_PERCENT:.0%} of the sampling on)."
          "\nPSNR: of the clip's preview against dense. L1: of single attention calls halfway, relative to dense.")
    if not gpu:
        print("On the CPU SpargeAttn is the readable reference: its times say nothing about the GPU kernels.")

    args.out.mkdir(parents=True, exist_ok=True)
    captions = ["dense", *(f"{r.name}: {1 - r.kept:.0%} skipped, {r.psnr:.1f} dB" for r in runs[1:])]
    pictures.side_by_side(args.out / "comparison.webp", captions, [r.latent for r in runs])
    pictures.block_maps(args.out / "block_maps.png", maps)
    print(f"\nwrote {args.out / 'comparison.webp'} and {args.out / 'block_maps.png'}")


if __name__ == "__main__":
    main()

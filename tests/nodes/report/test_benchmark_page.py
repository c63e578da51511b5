"""Benchmarks as pictures, without ComfyUI."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from comfyui_spargeattn.kernels._triton.config import attend_config
from comfyui_spargeattn.kernels.benchmark import SHAPES, Result, Timed, Tried
from comfyui_spargeattn.kernels.benchmark.candidates import neighbours
from comfyui_spargeattn.nodes.report.benchmark_page import draw_benchmark
from comfyui_spargeattn.nodes.report.page import THEMES, WIDTH

ENTRY = attend_config("sm89", 128, "int8")
FIRST, SECOND, *_ = neighbours(ENTRY)


def result():
    shares = [Timed("SpargeAttn, all blocks", 20.0, error=0.03),
              *(Timed(f"SpargeAttn, {share}% of the blocks", share / 5) for share in (50, 30, 10))]
    return Result(SHAPES["SDXL 1024x1024"], torch.bfloat16, {"card": "a card", "torch": "2.11"}, True, "int8",
                  Timed("ComfyUI's attention_pytorch", 40.0), shares,
                  [Tried(ENTRY, 10.0), Tried(FIRST, 8.0), Tried(SECOND, problem="out of resource: shared memory " * 5)],
                  FIRST, 1.25)


def widths(picture, color):
    """Widths of the bars of a colour, from the top down, in pixels."""
    rows = (np.array(picture) == color).all(-1).sum(1)
    bars = [list(group) for _, group in itertools.groupby(rows.tolist())]
    return [bar[0] for bar in bars if bar[0] and len(bar) > 20]  # letters are not as tall


@pytest.mark.parametrize("theme", THEMES)
def test_bars_are_as_long_as_times(theme):
    colors = THEMES[theme]
    picture = draw_benchmark(result(), colors)
    [dense] = widths(picture, colors.dense[0])
    ours = widths(picture, colors.ramp[2])
    assert [bar / dense for bar in ours] == pytest.approx([0.5, 0.25, 0.15, 0.05], abs=0.01)
    [table], [faster] = widths(picture, colors.ramp[1]), widths(picture, colors.ramp[-1])
    assert faster / table == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("theme", THEMES)
def test_what_failed_or_was_not_tried(theme):
    colors, whole = THEMES[theme], result()
    failed = draw_benchmark(replace(whole, ours=[Timed("SpargeAttn, all blocks", problem="wrong")], tried=[],
                                    faster=None), colors)
    assert failed.width == WIDTH and failed.height < draw_benchmark(whole, colors).height
    assert not widths(failed, colors.ramp[2]) and len(widths(failed, colors.dense[0])) == 1
    none_faster = draw_benchmark(replace(whole, faster=None), colors)
    assert len(widths(none_faster, colors.ramp[-1])) == 1  # the table's
    assert draw_benchmark(Result(whole.shape, whole.dtype, {}, False, notes=["a reason"]), colors).height < 300


def test_headlines():
    whole = result()
    assert whole.headline == "30% of the blocks: 6.7 × as fast as dense"
    slower = replace(whole, ours=[Timed("SpargeAttn, 30% of the blocks", 80.0)])
    assert slower.headline == "30% of the blocks: 2.0 × slower than dense"
    assert replace(whole, dense=None).headline == "SpargeAttn was not timed"
    assert replace(whole, fast=False).headline == "There are no fast kernels here"
    assert whole.verdict.startswith(f"{FIRST.warps} warps, {FIRST.stages} stages: 25% faster")

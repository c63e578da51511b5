"""The launch configurations that are tried."""
import pytest

from comfyui_spargeattn.kernels._triton.config import attend_config
from comfyui_spargeattn.kernels.benchmark.candidates import neighbours


@pytest.mark.parametrize("arch", ("sm80", "sm86", "sm89", "sm90", "sm100", "gfx942"))
@pytest.mark.parametrize("dim", (32, 64, 128, 256))
def test_neighbours_of_every_entry(arch, dim):
    entry = attend_config(arch, dim, "fp16")
    found = neighbours(entry)
    assert entry not in found and len(set(found)) == len(found)
    assert all((config.block, config.tma) == (entry.block, entry.tma) for config in found)
    assert {(config.warps, config.stages) for config in (entry, *found)} >= {
        (warps, stages) for warps in (4, 8) for stages in (1, 2, 3, 4)}
    assert {config.maxnreg for config in found if config.warps != entry.warps} == {None}
    assert {config.maxnreg for config in (entry, *found) if config.warps == entry.warps} == {None, entry.maxnreg}
    # What is near the table's comes first.
    assert {abs(config.stages - entry.stages) for config in found[:2]} <= {0, 1}

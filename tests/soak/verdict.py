"""The verdict on a soak: its figures in words, and everything that went wrong."""
from __future__ import annotations

from .growth import medians, slope
from .run import Soak

# Bytes a prompt. One q of the smallest call, 256 tokens by 256 channels in float32, has 256 KiB, so a tensor kept by
# every sixth prompt is found; smaller things are left to the census. Measured without a leak: 5 and 15 KiB.
MEMORY_SLOPE = 40 << 10
ENOUGH = 900  # prompts after the warm-up; the allocator takes some hundreds to settle
MIB = 1 << 20


def problems(soak: Soak) -> list[str]:
    found = list(soak.problems)
    warm = soak.samples[soak.warm:]
    growth = slope([sample.memory for sample in warm])
    if len(warm) >= ENOUGH and growth > MEMORY_SLOPE:
        found.append(f"memory grew by {growth / 1024:.0f} KiB a prompt")
    for name in ("threads", "files"):
        first, *_, last = medians([getattr(sample, name) for sample in warm])
        if last > first:
            found.append(f"{name} grew from {first:g} to {last:g}")
    found += [f"{count} {kind} at the end, {soak.first_census.get(kind, 0)} at the start"
              for kind, count in soak.last_census.items() if count > soak.first_census.get(kind, 0)]
    if not soak.sparse_calls:
        found.append("no attention call was sparse")
    return found


def figures(soak: Soak, seconds: float) -> str:
    warm = soak.samples[soak.warm:]
    memory = [x / MIB for x in medians([sample.memory for sample in warm])]
    ends = ", ".join(f"{count} {status}" for status, count in soak.outcomes.most_common())
    return (f"{len(soak.samples)} prompts in {seconds:.0f} s: {ends}; {soak.sparse_calls} sparse attention calls\n"
            f"memory {memory[0]:.0f} MiB after the warm-up of {soak.warm} prompts, {memory[-1]:.0f} MiB at the end, "
            f"{min(memory):.0f} to {max(memory):.0f} between; slope "
            f"{slope([sample.memory for sample in warm]) / 1024:.1f} KiB a prompt\n"
            f"threads {warm[0].threads} and {warm[-1].threads}, open files {warm[0].files} and {warm[-1].files}, "
            f"with nothing cached {soak.first_census} and {soak.last_census}")

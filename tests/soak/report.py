"""What a soak found, in words."""
from __future__ import annotations

from . import growth
from .run import Soak

MIB = 1 << 20


def judge(soak: Soak, seconds: float) -> int:
    """Print the figures; the exit status is 1 where something is wrong."""
    warm = soak.samples[soak.warm:]
    for name in ("memory", "threads", "files"):
        values = [getattr(sample, name) for sample in warm]
        windows = growth.medians(values)
        print(name, [round(x / MIB, 1) if name == "memory" else x for x in windows], growth.slope(values))
    print(soak.outcomes, len(soak.samples), seconds, soak.sparse_calls, soak.first_census, soak.last_census)
    for problem in soak.problems[:10]:
        print(problem)
    return bool(soak.problems)

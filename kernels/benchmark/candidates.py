"""Launch configurations that are tried beside the table's."""
from __future__ import annotations

from dataclasses import replace

from .._triton.config import AttendConfig

WARPS = (4, 8)
STAGES = (1, 2, 3, 4)


def neighbours(entry: AttendConfig) -> list[AttendConfig]:
    """The configurations around an entry of the table, those that differ least first; the entry is not among them.

    The block shape stays, because thresholds are tuned for it. A cap of registers goes with the table's warps alone.
    """
    caps = dict.fromkeys((entry.maxnreg, None))
    found = [replace(entry, warps=warps, stages=stages, maxnreg=cap)
             for warps in WARPS for stages in STAGES for cap in caps if cap is None or warps == entry.warps]
    return sorted((config for config in found if config != entry), key=lambda config: (
        abs(config.stages - entry.stages) + (config.maxnreg != entry.maxnreg) + (config.warps != entry.warps)))

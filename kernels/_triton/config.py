"""Launch configurations by architecture and head_dim. Pure tables: they change on other evidence than the kernels.

Measured: sm90 (H100). Others are predicted by tests/bench/count_instructions.py from their machine code.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..triton_package import triton_version
from ..types import BlockShape


@dataclass(frozen=True)
class AttendConfig:
    """Launch of the attention kernel.

    block: block shape of the map, in tokens. warps: of a program. stages: of the pipeline that loads K and V ahead.
    maxnreg: most registers of a thread, None for the compiler's choice. tma: whether K and V come by the tensor memory
    accelerator, where Triton has descriptors. fp16_sums: whether 16-bit P·V of a block is summed in float16, which
    doubles the rate of GeForce's tensor cores. ptx: whether P is packed by NVIDIA's instructions. key_group: tokens in
    each of which V's are permuted in INT8, so that the registers which hold P are those that P·V reads it from.
    """

    block: BlockShape
    warps: int
    stages: int
    maxnreg: int | None = None
    tma: bool = False
    fp16_sums: bool = False
    ptx: bool = False
    key_group: int = 16

    @property
    def tail_tile(self) -> int:
        """Pooled blocks that a step of the tail takes together, 32 or 64: half as many as a block has keys, because the
        loop over blocks leaves registers for no more."""
        return max(32, min(64, self.block.k // 2))

    @property
    def map_registers(self) -> int | None:
        """Most registers of a thread of the map's kernel: so few that two programs fit a multiprocessor of NVIDIA's."""
        return 128 if self.ptx else None

    def options(self) -> dict:
        """Triton's launch options."""
        options = dict(num_warps=self.warps, num_stages=self.stages)
        return options if self.maxnreg is None else options | dict(maxnreg=self.maxnreg)


def _both(block: BlockShape, warps: int, stages: int, maxnreg: int | None = None,
          tma: bool = False) -> tuple[AttendConfig, AttendConfig]:
    """One configuration for both formats of P·V."""
    config = AttendConfig(block, warps, stages, maxnreg, tma)
    return config, config


# family -> the most channels, see `channel_tiles` -> configurations: 16-bit P·V, then INT8 P·V. Up to head_dim 128 no
# registers spill, with any switch, but where a comment says so; bytes are of a thread, with Triton 3.9.
_TABLE: dict[str, dict[int, tuple[AttendConfig, AttendConfig]]] = {
    # Measured as the fastest. At head_dim 128 they spill, but load few in the loop over blocks that need no care: INT8
    # up to 120 bytes, because a third thread block leaves 168 registers, of which sums, products and, in the careful
    # loop, scales by channel fill 160; 16 bits up to 304, most where a thread's 128 sums meet 128 residuals. At
    # head_dim 64, 16 bits with a pooled tail spill 16.
    "sm90": {
        64: (AttendConfig(BlockShape(64, 128), 4, 2, 168, tma=True),
             AttendConfig(BlockShape(64, 128), 4, 3, 168, tma=True)),
        96: (AttendConfig(BlockShape(64, 64), 4, 2, 128, tma=True),
             AttendConfig(BlockShape(64, 128), 4, 2, 168, tma=True)),
        128: (AttendConfig(BlockShape(128, 64), 4, 3, tma=True),
              AttendConfig(BlockShape(64, 128), 4, 2, 168, tma=True)),
        160: _both(BlockShape(64, 64), 4, 2, 168, tma=True),
        256: _both(BlockShape(64, 64), 4, 2, tma=True),
    },
    # Four warps: Triton 3.9 does not compile the λ test with eight here.
    "sm100": {
        64: _both(BlockShape(64, 128), 4, 3, tma=True),
        128: _both(BlockShape(64, 64), 4, 3, tma=True),
        256: _both(BlockShape(64, 64), 4, 2, tma=True),
    },
    # A100: 163 KB of shared memory. At head_dim 128, 128×128 has a bound 4% lower, but a coarser map skips less.
    # INT8 there spills 96 bytes with the λ test and up to 16 in three other variants; 128×32 with two stages spills
    # none, but its bound is 10% higher.
    "sm80": {
        64: (AttendConfig(BlockShape(128, 64), 4, 2), AttendConfig(BlockShape(128, 64), 8, 3)),
        128: _both(BlockShape(128, 64), 8, 3),
        256: _both(BlockShape(64, 64), 8, 2),
    },
    # RTX 30, 40 and 50: 99 KB of shared memory. RTX 50 spills up to 16 bytes in three variants of 16 bits at head_dim
    # 64, under the cap by which a third thread block fits, and at 128 with a pooled tail or all switches up to 48 in
    # INT8 and 40 in 16 bits; RTX 40 8 in INT8 there.
    "consumer": {
        64: (AttendConfig(BlockShape(64, 64), 4, 2, 168), AttendConfig(BlockShape(64, 64), 4, 3)),
        128: (AttendConfig(BlockShape(128, 64), 8, 3), AttendConfig(BlockShape(128, 32), 8, 3)),
        256: _both(BlockShape(64, 64), 8, 2),
    },
    # AMD: 64 KB of LDS a work group. MFMA's tiles have 32 rows: with fewer rows a wave, CDNA computes products twice.
    "cdna": {
        64: _both(BlockShape(128, 64), 4, 2),
        128: _both(BlockShape(128, 64), 4, 1),
        256: (AttendConfig(BlockShape(128, 32), 4, 2), AttendConfig(BlockShape(128, 32), 4, 1)),
    },
    # At head_dim 128 they spill, because a thread has 256 registers: RX 7900 up to 512 bytes in 16 bits and 756 in
    # INT8, RX 9070 up to 48 and 168. Twice the warps for as many rows spill less, with a bound 1.4 to 1.5 times as
    # high; 64×16 spills none, but its map is too large.
    "rdna": {
        64: _both(BlockShape(128, 32), 8, 1),
        128: _both(BlockShape(128, 32), 8, 1),
        # Triton 3.2 does not compile INT8 with 16 warps and two stages for RX 7900.
        256: (AttendConfig(BlockShape(64, 32), 16, 2), AttendConfig(BlockShape(64, 32), 8, 1)),
    },
    # Intel, and Triton's interpreter.
    "other": {
        64: _both(BlockShape(128, 64), 4, 2),
        128: _both(BlockShape(128, 64), 8, 2),
        256: _both(BlockShape(64, 64), 8, 2),
    },
}
_FAMILIES = {"sm80": "sm80", "sm90": "sm90", "sm100": "sm100", "sm103": "sm100", "gfx9": "cdna", "gfx1": "rdna"}


@functools.lru_cache
def attend_config(arch: str, channels: int, pv_format: str) -> AttendConfig:
    """The configuration for an architecture ("sm90", "gfx942", …), the channels of a head in whole tiles, at most 256,
    and a format of P·V, "int8" or "fp16"."""
    family = _FAMILIES.get(arch) or _FAMILIES.get(arch[:4]) or ("consumer" if arch.startswith("sm") else "other")
    entries = _TABLE[family]
    entry = entries[min(most for most in entries if most >= channels)][pv_format == "int8"]
    return replace(entry, ptx=arch.startswith("sm"), fp16_sums=family == "consumer" and pv_format == "fp16",
                   key_group=32 if family in ("sm80", "consumer") and _eight_keys_a_thread() else 16)


def _eight_keys_a_thread() -> bool:
    """Whether Triton has a thread of mma.sync hold eight neighbouring keys of an INT8 operand, and not four."""
    return (3, 4) <= (triton_version() or (0, 0)) <= (3, 7)


def prepare_warps(block: int, padded_dim: int) -> int:
    """Warps of a preparation program, which holds block tokens × padded_dim channels: about 128 elements a thread,
    because few warps sum a column fast."""
    return max(2, min(16, block * padded_dim // 4096))


def store_bytes(block: int) -> int:
    """Quantised bytes that a thread of a preparation program stores at once, by tokens of its block; measured on sm90.

    With 16 a thread also loads 16 elements of the 16-bit input, in two steps that use half a sector each, but handles
    half as many rows.
    """
    return 8 if block <= 64 else 16

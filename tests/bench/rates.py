"""What one multiprocessor (a compute unit on CDNA, a workgroup processor on RDNA) does in a clock and holds, by the
vendors' documents.

Tensor rates are dense multiply-adds: NVIDIA's architecture whitepapers (A100, GA102, Ada, H100, Blackwell) and AMD's
(CDNA 3; GPUOpen's pages on the matrix cores of RDNA 3 and 4) give them for a card or a unit. Occupancy is by the tables
of compute capabilities in the CUDA programming guide, and by LLVM's guide to the AMDGPU backend.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """tensor: multiply-adds a clock by kind of product, "int8" or the input's format with that of the sums.
    lanes: threads of a warp. issue: warps that issue an instruction in a clock; on AMD, a vector instruction.
    exponentials: exp2 of threads a clock. shared_bytes: of shared memory (LDS) moved in a clock.
    registers: of a multiprocessor or, where `simds` is given, of a lane of each of its SIMDs; unit: in which a warp (a
    lane) gets them. warps, thread_blocks: most that are resident. shared, reserved: bytes of shared memory, and bytes
    that each thread block takes beyond its own.
    """

    tensor: dict[str, int]
    lanes: int
    issue: float
    registers: int
    unit: int
    warps: int
    thread_blocks: int
    shared: int
    reserved: int = 0
    simds: int | None = None
    exponentials: int = 16
    shared_bytes: int = 128

    @property
    def dense_rate(self) -> int:
        """Multiply-adds a clock of 16-bit dense attention, which sums in fp32."""
        return self.tensor["fp16, fp32 sums"]

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Thread blocks of so many warps, registers a thread and bytes of shared memory that are resident at a time."""
        if self.simds is None:
            a_warp = -(-registers * self.lanes // self.unit) * self.unit
            by_registers = self.registers // a_warp // warps
        else:
            a_lane = -(-registers // self.unit) * self.unit
            by_registers = self.registers // a_lane * self.simds // warps
        by_shared = self.shared // (shared + self.reserved) if shared + self.reserved else self.thread_blocks
        return min(self.thread_blocks, self.warps // warps, by_registers, by_shared)


def _nvidia(int8: int, fp16: int, fp16_sums: int, fp8: int | None, fp8_sums: int | None, warps: int,
            thread_blocks: int, shared: int) -> Multiprocessor:
    """fp16, fp8: with fp32 sums; fp16_sums, fp8_sums: with fp16 sums. shared: KB."""
    tensor = {"int8": int8, "fp16, fp32 sums": fp16, "fp16, fp16 sums": fp16_sums,
              "fp8, fp32 sums": fp8, "fp8, fp16 sums": fp8_sums}
    return Multiprocessor({kind: rate for kind, rate in tensor.items() if rate}, lanes=32, issue=4, registers=65536,
                          unit=256, warps=warps, thread_blocks=thread_blocks, shared=shared << 10, reserved=1 << 10)


MULTIPROCESSORS = {
    "sm80": _nvidia(2048, 1024, 1024, None, None, warps=64, thread_blocks=32, shared=164),
    "sm86": _nvidia(1024, 256, 512, None, None, warps=48, thread_blocks=16, shared=100),
    "sm89": _nvidia(1024, 256, 512, 512, 1024, warps=48, thread_blocks=24, shared=100),
    "sm120": _nvidia(1024, 256, 512, 512, 1024, warps=48, thread_blocks=24, shared=100),
    "sm90": _nvidia(4096, 2048, 2048, 4096, 4096, warps=64, thread_blocks=32, shared=228),
    "sm100": _nvidia(8192, 4096, 4096, 8192, 8192, warps=64, thread_blocks=32, shared=228),
    # Four SIMDs of 16 lanes, on which a wave of 64 takes four clocks.
    "gfx942": Multiprocessor({"int8": 2048, "fp16, fp32 sums": 1024}, lanes=64, issue=1, registers=512, unit=8,
                             warps=32, thread_blocks=16, shared=64 << 10, simds=4),
    # A workgroup processor, which is two compute units: four SIMDs of 32 lanes.
    "gfx1100": Multiprocessor({"int8": 512, "fp16, fp32 sums": 512, "fp16, fp16 sums": 512}, lanes=32, issue=4,
                              registers=1536, unit=24, warps=64, thread_blocks=32, shared=128 << 10, simds=4,
                              exponentials=32, shared_bytes=256),
    "gfx1201": Multiprocessor({"int8": 2048, "fp16, fp32 sums": 1024, "fp16, fp16 sums": 1024}, lanes=32, issue=4,
                              registers=1536, unit=24, warps=64, thread_blocks=32, shared=128 << 10, simds=4,
                              exponentials=32, shared_bytes=256),
}

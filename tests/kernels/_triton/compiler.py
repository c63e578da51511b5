"""What the compile scripts share: a driver without a device, and what a compiled kernel came to."""
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget


class CompileOnlyDriver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, arch: str):
        self.target = (GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else
                       GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32))

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def assembly(kernel, tool: str, option: str) -> str:
    """What one of the CUDA tools that come with Triton says of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel) -> dict:
    """Registers a thread, spilled bytes and shared memory of a compiled kernel."""
    shared = kernel.metadata.shared
    if "cubin" in kernel.asm:
        found = re.search(r"REG:(\d+) STACK:(\d+)", assembly(kernel, "cuobjdump", "--dump-resource-usage"))
        return dict(registers=int(found[1]), spilled=int(found[2]), shared=shared)
    text = kernel.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    return dict(registers=registers, spilled=spilled * 4, shared=shared)


def cause(error: BaseException) -> str:
    """The line that says why a kernel did not compile."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if line.startswith("ptxas ")), lines[-1]).strip()

"""What the compile scripts share: a driver without a device, and what a compiled kernel came to."""
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Largest shared memory of one thread block in bytes.
SHARED_LIMITS = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10,
                 "sm120": 99 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10}
_launch = JITFunction.run


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


def compile_launches(arch: str, wanted: Callable[[str], bool] = lambda kernel: True) -> list:
    """Make every launch of this process a compilation for an architecture, and those of kernels that are not wanted do
    nothing. Returns the list to which each compilation adds (name of the kernel, compiled kernel or exception)."""
    from comfyui_spargeattn.kernels._triton import pipeline
    triton.runtime.driver.set_active(CompileOnlyDriver(arch))
    pipeline.arch_of = lambda device: arch
    compiled = []

    def compile_instead(self, *args, grid, warmup, **kwargs):
        if not wanted(self.__name__):
            return
        try:
            kernel = _launch(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler raises; the other kernels are still of interest
            kernel = error
        compiled.append((self.__name__, kernel))

    JITFunction.run = compile_instead
    return compiled


def disassembly(kernel) -> str:
    """The machine code of a compiled kernel as text, with labels."""
    return assembly(kernel, "nvdisasm", "-c") if "cubin" in kernel.asm else kernel.asm["amdgcn"]


def assembly(kernel, tool: str, option: str) -> str:
    """What one of the CUDA tools that come with Triton says of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def tensor_instructions(text: str) -> list[str]:
    """The kinds of tensor instructions in a disassembly: IMMA and the like, v_mfma_…, v_wmma_…."""
    return sorted(set(re.findall(r"\b(?:UTC)?[IHQ]G?MMA\b|\bv_(?:mfma|wmma)_\w+", text)))


def resources(kernel) -> dict:
    """Registers and spilled bytes of a thread, and shared memory of a thread block, of a compiled kernel."""
    shared = kernel.metadata.shared
    if "cubin" in kernel.asm:
        found = re.search(r"REG:(\d+) STACK:(\d+)", assembly(kernel, "cuobjdump", "--dump-resource-usage"))
        return dict(registers=int(found[1]), spilled=int(found[2]), shared=shared)
    text = kernel.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
                          for name in ("vgpr_count", "private_segment_fixed_size"))
    return dict(registers=registers, spilled=spilled, shared=shared)


def cause(error: BaseException) -> str:
    """The line that says why a kernel did not compile."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if line.startswith("ptxas ")), lines[-1]).strip()

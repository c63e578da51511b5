"""Every shipped configuration compiles for every architecture it is shipped for, within its resources."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ARCHES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100", "gfx1201")
KERNELS = {"_queries_kernel", "_keys_kernel", "_select_kernel", "_attend_kernel"}
# Bytes a thread that the assembler may keep on its stack, up to the head_dim for which registers are promised to
# suffice: releases of Triton differ by a few registers. At head_dim 256 the accumulators of FP8 alone fill them.
MAX_STACK, PROMISED_DIM = 64, 128


def run(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, timeout=580,
                          check=False, env=environment | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def compilations():
    """arch -> future of the process that compiles for it; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {arch: pool.submit(run, "compile_all.py", arch, "64", "128", "256", "--thin") for arch in ARCHES}


@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_within_limits(arch, compilations):
    from triton.backends import backends
    if arch.startswith("gfx") and "amd" not in backends:
        pytest.skip("this Triton has no AMD backend")
    process = compilations[arch].result()
    assert process.returncode == 0, process.stderr[-4000:]
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in found} == KERNELS

    too_large = [kernel for kernel in found if kernel["shared"] > kernel["limit"]]
    assert not too_large, f"more shared memory than {arch} has: {too_large}"
    attend = [kernel for kernel in found if kernel["kernel"] == "_attend_kernel"]
    formats = {"fp16", "int8"}
    plain = [kernel for kernel in attend
             if not kernel["causal"] and not kernel["skip_pv"] and kernel["skipped"] == "drop"
             and kernel["residual"] == "none"]  # one in the last lines takes registers there, outside the loops
    assert {(kernel["dim"], kernel["pv_dtype"]) for kernel in plain} == {
        (dim, pv_dtype) for dim in (64, 128, 256) for pv_dtype in formats}
    for switch in ({"causal": True}, {"skip_pv": True}, {"skipped": "pooled"}, {"residual": "added"},
                   {"residual": "made"}):
        compiled = {kernel["pv_dtype"] for kernel in attend if switch.items() <= kernel.items()}
        assert compiled == formats, f"{switch} was not compiled"
    if arch.startswith("sm"):
        spilled = [kernel for kernel in plain if kernel["dim"] <= PROMISED_DIM and kernel["spilled"] > MAX_STACK]
        assert not spilled, f"the plain attention kernel spills registers: {spilled}"
    waiting = [kernel for kernel in attend if kernel["serialised"]]
    assert not waiting, f"tensor-core products wait for one another: {waiting}"


def test_sizes_and_thresholds_do_not_compile_again():
    process = run("compile_again.py", "sm90")
    assert process.returncode == 0, process.stderr[-4000:]
    assert json.loads(process.stdout) == []

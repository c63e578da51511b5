"""Every shipped configuration compiles for every architecture it is shipped for, within its resources."""
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ARCHES = ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100", "gfx1201")  # sm86 gets what sm89 gets
KERNELS = {"_queries_kernel", "_keys_kernel", "_select_kernel", "_attend_kernel", "_count_kernel"}
VARIANTS = {"plain", "pooled tail", "pooled tail, bias", "causal, padding", "λ test, order", "residual, log-sum-exp",
            "residual made", "everything"}
# Up to this head_dim no variant spills registers but for these, in bytes a thread, with Triton 3.9; the table in
# config.py says what bounds them. Beyond, the accumulators alone fill the registers.
PROMISED_DIM = 128
SPILLED = {("sm80", 128, "int8"): 96, ("sm89", 128, "int8"): 8, ("sm120", 64, "fp16"): 16, ("sm120", 128, "int8"): 48,
           ("sm120", 128, "fp16"): 40, ("sm90", 64, "fp16"): 16, ("sm90", 128, "int8"): 120,
           ("sm90", 128, "fp16"): 304, ("gfx1100", 128, "int8"): 756, ("gfx1100", 128, "fp16"): 512,
           ("gfx1201", 128, "int8"): 168, ("gfx1201", 128, "fp16"): 48}
# One of these multiplies INT8 natively.
INT8_PRODUCTS = re.compile("(UTC)?IG?MMA|v_wmma_i32_16x16x16_iu8|v_mfma_i32_.*_i8")


def run(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, check=False,
                          timeout=3600, env=environment | {"OMP_NUM_THREADS": "1"})


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
    compiled = {(kernel["dim"], kernel["pv_dtype"], kernel["variant"]) for kernel in attend}
    assert {found for found in compiled if found[2] == "plain"} == set(itertools.product((64, 128, 256), formats,
                                                                                         {"plain"}))
    assert {found[2] for found in compiled} == VARIANTS
    assert arch != "sm90" or {found[1:] for found in compiled} == set(itertools.product(formats, VARIANTS))
    spilled = [kernel for kernel in attend if kernel["dim"] <= PROMISED_DIM
               and kernel["spilled"] > SPILLED.get((arch, kernel["dim"], kernel["pv_dtype"]), 0)]
    assert not spilled, f"the attention kernel spills registers: {spilled}"
    # Where a row of the map lies in several warps, every step of its search takes barriers: 250 in all on sm90.
    across = [kernel for kernel in found if kernel["kernel"] == "_select_kernel" and kernel["barriers"] > 80]
    assert not across, f"rows of the map lie in several warps: {across}"
    shared = [kernel for kernel in attend if kernel["dim"] <= PROMISED_DIM and kernel.get("waiting")]
    assert not shared, f"P goes through shared memory in the format that is the default: {shared}"
    emulated = [kernel for kernel in attend if not any(map(INT8_PRODUCTS.fullmatch, kernel["tensor"]))]
    assert not emulated, f"no native products of INT8: {emulated}"
    # All switches at once leave no registers.
    waiting = [kernel for kernel in attend if kernel["serialised"] and kernel["variant"] != "everything"]
    assert not waiting, f"tensor-core products wait for one another: {waiting}"


def test_sizes_and_thresholds_do_not_compile_again():
    process = run("compile_again.py", "sm90")
    assert process.returncode == 0, process.stderr[-4000:]
    assert json.loads(process.stdout) == []

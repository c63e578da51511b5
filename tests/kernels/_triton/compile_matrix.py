"""Compile the kernels with every Triton that users have, for NVIDIA's architectures: `python compile_matrix.py FOLDER`.

Prints a table, Triton × architecture: ok, dense (the pack declines) or fails, and below it why; exits 1 where something
fails. Each Triton is installed into FOLDER, which also keeps what was compiled, and runs with the torch of this Python:
a CPU build will do. Options: --triton and --arch choose some of them.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TRITONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "newest")
ARCHES = ("sm80", "sm86", "sm89", "sm90", "sm120")
HERE = Path(__file__).resolve().parent


def install(triton: str, folder: Path) -> Path:
    """The folder of a Triton, installed unless it is there; the newest is looked up each time."""
    target = folder / f"triton-{triton}"
    if triton == "newest" or not target.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", target,
                        "triton" if triton == "newest" else f"triton=={triton}"], check=True)
    return target


def compile_for(arch: str, triton: Path, path: str) -> tuple[str, list[str]]:
    """A cell of the table, and a line for each thing to say of it."""
    environment = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(triton / "compiled"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, HERE / "compile_all.py", arch, "64", "128", "--thin"],
                             capture_output=True, text=True, env=os.environ | environment)
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    if lines and "declined" in lines[0]:
        return "dense", [lines[0]["declined"]]
    failed = {f"{line['kernel']}: {line['error']}": line for line in lines if "error" in line}
    said = [f"{error} (head_dim {line['dim']}, P·V {line['pv_dtype']})" for error, line in failed.items()]
    said += [f"P goes through shared memory in the format that is the default (head_dim {line['dim']}, P·V "
             f"{line['pv_dtype']})" for line in lines if line.get("waiting")]
    if tuple(map(int, version(triton).split(".")[:2])) >= (3, 4):  # the assembler of older ones can't do better
        said += [f"tensor-core products wait for one another (head_dim {line['dim']}, P·V {line['pv_dtype']}, "
                 f"{line['variant']})" for line in lines if line.get("serialised") and line["variant"] != "everything"]
    if failed:  # what the compiler's passes have against a kernel stands in stderr alone
        said += [line for line in process.stderr.splitlines() if "error:" in line][:3]
    if process.returncode:
        said += [f"exit status {process.returncode}", *process.stderr.splitlines()[-1:]]
    word = "fails" if said else "ok"
    print(version(triton), arch, word, file=sys.stderr, flush=True)
    return word, said


def main(tritons: list[str], arches: list[str], folder: Path) -> bool:
    """Print the table; whether nothing failed."""
    package = folder / "package/comfyui_spargeattn"
    package.parent.mkdir(parents=True, exist_ok=True)
    package.unlink(missing_ok=True)
    package.symlink_to(HERE.parents[2])
    rows = [install(triton, folder) for triton in tritons]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cells = {(row, arch): pool.submit(compile_for, arch, row, os.pathsep.join([str(row), str(package.parent)]))
                 for row in rows for arch in arches}
        cells = {cell: future.result() for cell, future in cells.items()}
    print("| Triton |", " | ".join(arches), "|\n|---|" + "---|" * len(arches))
    for row in rows:
        print("|", version(row), "|", " | ".join(cells[row, arch][0] for arch in arches), "|")
    for (row, arch), (_, said) in cells.items():
        for line in said:
            print(f"{version(row)} {arch}: {line}")
    return all(word != "fails" for word, _ in cells.values())


def version(triton: Path) -> str:
    """What is installed in the folder of a Triton."""
    return next(triton.glob("triton-*.dist-info")).name.removeprefix("triton-").removesuffix(".dist-info")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--triton", nargs="+", default=TRITONS)
    parser.add_argument("--arch", nargs="+", default=ARCHES)
    arguments = parser.parse_args()
    sys.exit(not main(arguments.triton, arguments.arch, arguments.folder.resolve()))

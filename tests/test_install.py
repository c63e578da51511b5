"""What pip installs from the repository's archive, from a source distribution and from a wheel works with torch alone.

These tests build packages, for which pip fetches setuptools.
"""
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = re.search(r"<!-- python: torch -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"),
                    re.DOTALL)[1]
# Whatever is imported beside the standard library has to be torch's.
CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
""" + SNIPPET + """
import comfyui_spargeattn
from comfyui_spargeattn import hilbert
from comfyui_spargeattn.kernels.integrations import transformers
assert comfyui_spargeattn.__path__ == [sys.argv[1] + "/comfyui_spargeattn"], comfyui_spargeattn.__path__
assert sparge_attention(q, k, v, order=hilbert.sequence_order((8, 16, 16))).shape == q.shape
new = {name.partition(".")[0] for name in sys.modules} - known - {"comfyui_spargeattn"}
needs_of_torch = {"numpy", "sympy", "mpmath", "networkx", "jinja2", "filelock", "fsspec", "typing_extensions", "triton"}
assert new <= needs_of_torch, new
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git repository")]


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The repository as its host packs it: what is committed, in one folder."""
    path = tmp_path_factory.mktemp("archive") / "ComfyUI-SpargeAttn.tar.gz"
    run("git", "archive", "--prefix=ComfyUI-SpargeAttn/", "-o", str(path), "HEAD", cwd=ROOT)
    return path


@pytest.fixture(scope="module")
def sdist(archive, tmp_path_factory):
    """A source distribution by the build backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    pytest.importorskip("setuptools", minversion="77")
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('.')",
        cwd=folder / "ComfyUI-SpargeAttn")
    path, = (folder / "ComfyUI-SpargeAttn").glob("*.tar.gz")
    return path


@pytest.mark.parametrize("source", ("archive", "sdist"))
def test_install(source, request, tmp_path):
    """The wheel that pip builds of it holds the package's modules and works outside the repository."""
    path = str(request.getfixturevalue(source))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", ".", path, cwd=tmp_path)
    wheel, = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    committed = run("git", "ls-tree", "-r", "--name-only", "HEAD", cwd=ROOT).split()
    assert found == {f"comfyui_spargeattn/{name}" for name in committed
                     if name == "py.typed" or name.endswith(".py") and not name.startswith("tests/")}
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", "installed", str(wheel), cwd=tmp_path)
    run(sys.executable, "-c", CHECK, str(tmp_path / "installed"), cwd=tmp_path)

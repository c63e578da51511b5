"""The archive that the registry hands out: built from git and .comfyignore, unpacked into a clean ComfyUI."""
import fnmatch
import shutil
import subprocess
import urllib.request
import zipfile

import comfy_server
import pytest
from english import own_nodes
from test_server import cpu_option

LARGEST = 16 << 20  # bytes; the demo's model takes 11 MB


def archived():
    """Tracked files that .comfyignore lets through; its lines are folders (with a final slash) and file patterns."""
    git = shutil.which("git")
    listing = git and subprocess.run([git, "-C", comfy_server.REPOSITORY, "ls-files"], capture_output=True, text=True)
    if not listing or listing.returncode:
        pytest.skip("building the archive needs a git checkout")
    ignored = (comfy_server.REPOSITORY / ".comfyignore").read_text().split()
    return [name for name in listing.stdout.splitlines() if not any(
        name.startswith(rule) if rule.endswith("/") else fnmatch.fnmatch(name, rule) for rule in ignored)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in archived():
            file.write(comfy_server.REPOSITORY / name, name)
    return path


def test_archive_holds_the_pack_and_nothing_else(archive):
    roots = {name.split("/")[0] for name in zipfile.ZipFile(archive).namelist()}
    assert roots == {"__init__.py", "nodes", "kernels", "hilbert", "workflows", "locales", "pyproject.toml",
                     "README.md", "LICENSE", "CHANGELOG.md", "requirements.txt"}
    assert archive.stat().st_size < LARGEST


def test_unpacked_archive_loads_in_a_clean_comfyui(archive, tmp_path):
    pack = tmp_path / "pack"
    zipfile.ZipFile(archive).extractall(pack)
    base = tmp_path / "comfyui"
    comfy_server.prepare(base, pack=pack)
    with comfy_server.running(base, *cpu_option()) as server:
        assert {"ApplySpargeAttn", "SpargeAttnReport"} <= own_nodes(server).keys()
        assert len(server.get("/workflow_templates")["spargeattn-nodes"]) >= 12
        assert server.get("/i18n")["zh"]["nodeDefs"]["ApplySpargeAttn"]
        for path in ("docs/ApplySpargeAttn/zh-TW.md", "docs/SpargeAttnReport/report.png"):
            with urllib.request.urlopen(f"{server.url}/extensions/spargeattn-nodes/{path}", timeout=10) as page:
                assert page.read()
        assert "IMPORT FAILED" not in server.log()

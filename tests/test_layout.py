"""Which part of the package imports which: one direction, and ComfyUI and Triton in their own places alone."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = "hilbert", "kernels", "nodes"
# Each part with the parts that it may import beside itself. What stands in none of them may import all.
MAY_IMPORT = {
    "hilbert": (),
    "kernels": (),
    "nodes.demo": (),
    "nodes.log": (),
    "nodes.presets": (),
    "nodes.tuned": ("hilbert", "kernels"),
    "nodes.call": ("hilbert", "kernels", "nodes.tuned"),
    "nodes.run": ("hilbert", "kernels", "nodes.tuned", "nodes.call", "nodes.log"),
    "nodes.report": ("hilbert", "kernels", "nodes.tuned", "nodes.call", "nodes.run", "nodes.log"),
}
OTHERS = {"numpy", "PIL", "safetensors", "torch"}  # what these parts may import of other projects; not ComfyUI


def module_name(path):
    """Within the package, such as "nodes.call.plan"; a package has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(source, package):
    """Modules that a source imports anywhere, also in functions: "x.y" of other projects, ".x.y" of this package.

    package: the parts of the name of the package that the source stands in, from the root of this one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                parts = ["", *package[:len(package) - node.level + 1], *parts]
            found = [".".join([*parts, alias.name]) for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("comfyui_spargeattn") for name in found)


MODULES = {module_name(path): list(imports(
    path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts))
    for part in PARTS for path in (ROOT / part).rglob("*.py")}


def within(name, part):
    return name == part or name.startswith(f"{part}.")


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_layout_have_one_direction(part):
    names = [name for name in MODULES if within(name, part)]
    assert names
    for name in names:
        for target in MODULES[name]:
            if target.startswith("."):
                allowed = any(within(target[1:], other) for other in (part, *MAY_IMPORT[part]))
            else:
                package = target.partition(".")[0]
                allowed = package in sys.stdlib_module_names or package in OTHERS or (
                    package == "triton" and within(name, "kernels._triton")) or (
                    name == f"kernels.integrations.{package}")
            assert allowed, f"{name} imports {target}"


def test_triton_is_imported_by_its_kernels_alone():
    importers = {name for name, targets in MODULES.items() for target in targets if within(target, "triton")}
    assert importers and all(within(name, "kernels._triton") for name in importers)


def test_integrations_are_imported_by_users_alone():
    assert not any(within(target, ".kernels.integrations") for name, targets in MODULES.items() for target in targets
                   if not within(name, "kernels.integrations"))


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "integrations").glob("*.py")), ids=lambda path: path.stem)
def test_an_integration_imports_its_library_only_when_asked(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not any(within(target, path.stem) for target in imports(ast.unparse(tree), ("kernels", "integrations")))


def test_words_of_a_report_do_not_import_its_pictures():
    for name in ("nodes.report.panels", "nodes.report.advice"):
        assert not any(within(target, ".nodes.report.page") for target in MODULES[name])


def project():
    """pyproject.toml; skips the test where Python can't read it."""
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_readme_clones_the_repository():
    address = project()["project"]["urls"]["Repository"]
    assert f"git clone {address}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_packages_are_those_that_exist():
    packages = [module_name(path) for part in PARTS for path in (ROOT / part).rglob("__init__.py")]
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(
        ["comfyui_spargeattn", *(f"comfyui_spargeattn.{name}" for name in packages)])


@pytest.mark.parametrize("source, expected", (
    ("import triton.language as tl", ["triton.language"]),
    ("from comfy import samplers, sd", ["comfy.samplers", "comfy.sd"]),
    ("from .page import Page", [".nodes.report.page.Page"]),
    ("from . import page", [".nodes.report.page"]),
    ("from ..run import state", [".nodes.run.state"]),
    ("from ...kernels import api", [".kernels.api"]),
    ("from comfyui_spargeattn.nodes.run import state", [".nodes.run.state"]),
    ("def call():\n    try:\n        import server\n    finally:\n        pass", ["server"]),
))
def test_every_form_of_import_is_seen(source, expected):
    assert list(imports(source, ("nodes", "report"))) == expected

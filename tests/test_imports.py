"""Imports go one way: nodes → {kernels, hilbert} → torch. ComfyUI is imported by the top level of nodes/ alone."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "comfyui_spargeattn"
MODULES = {".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
           for part in ("hilbert", "kernels", "nodes") for path in (ROOT / part).rglob("*.py")}
# What each part may reach beside the standard library, through whatever modules of this package it imports.
REACH = {
    "hilbert": {"hilbert", "torch"},
    "kernels": {"kernels", "torch", "triton", "safetensors"},
    **{f"nodes.{wing}": {"hilbert", "kernels", "nodes", "torch", "triton", "numpy", "PIL", "safetensors"}
       for wing in ("call", "report", "run", "tuned")},
}


def imported(module):
    """Full names that a module imports anywhere in its text, also inside functions."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield source
            yield from (name for alias in node.names if (name := f"{source}.{alias.name}") in MODULES)


def reached(module, seen):
    """Parts of this package and other packages that a module imports, itself or through modules of this package."""
    names = set()
    for name in imported(module):
        first, *rest = name.split(".")
        names |= {rest[0]} if first == PACKAGE and rest else {first} - {PACKAGE}
        if name in MODULES and name not in seen:
            seen.add(name)
            names |= reached(name, seen)
    return names - sys.stdlib_module_names


def of_part(part):
    return [module for module in MODULES if f"{module}.".startswith(f"{PACKAGE}.{part}.")]


@pytest.mark.parametrize("part", REACH)
def test_parts_reach_what_they_may(part):
    assert of_part(part)
    for module in of_part(part):
        assert reached(module, set()) <= REACH[part], module


def test_only_the_triton_kernels_import_triton():
    found = {module for module in MODULES if any(name.split(".")[0] == "triton" for name in imported(module))}
    assert found and found <= set(of_part("kernels._triton"))


def test_nodes_import_comfyui():
    """The test above would pass on any text; here it has something to find."""
    assert "comfy" in reached(f"{PACKAGE}.nodes.extension", set())

"""Starts ComfyUI inside this process, the way its main.py does, around a temporary base directory."""
import asyncio
import os
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[3]
# Users rename and clone packs as they like; hyphens and dots are the names that plain imports cannot express.
PACK_FOLDER = "ComfyUI-SpargeAttn.v1.0"


def prepare_base_directory(base, *extra_packs):
    """Create ComfyUI's folders under `base`, with this repository and `extra_packs` as custom nodes."""
    for name in ("models/diffusion_models", "custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / PACK_FOLDER).symlink_to(REPOSITORY, target_is_directory=True)
    for pack in extra_packs:
        (base / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)


def configure(base, **options):
    """Make `comfy` importable, with `base` as its base directory, before anything of it is imported.

    `options`: command-line options of ComfyUI by name, e.g. `highvram=True`.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.disable_dynamic_vram = True
    args.base_directory = str(base)
    for name, value in options.items():
        setattr(args, name, value)


def start(base, **options):
    """Import ComfyUI, configured with `options`, and load the packs of `base`; returns its `nodes` module."""
    configure(base, **options)
    import nodes

    asyncio.run(nodes.init_external_custom_nodes())
    # tests/demo imports the package by its name, under which ComfyUI's Python need not have it.
    sys.modules.setdefault("comfyui_spargeattn", sys.modules[pack_root(nodes)])
    return nodes


def pack_root(comfy_nodes):
    """The name under which ComfyUI has imported the pack."""
    return comfy_nodes.NODE_CLASS_MAPPINGS["ApplySpargeAttn"].__module__.removesuffix(".nodes.apply_node")


def pack_module(comfy_nodes, name):
    """A module of the pack that ComfyUI loaded, such as "nodes.override"."""
    return sys.modules[f"{pack_root(comfy_nodes)}.{name}"]

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


def start(base, **options):
    """Import ComfyUI with `base` as its base directory and load the packs there; returns its `nodes` module.

    `options`: command-line options of ComfyUI by name, e.g. `highvram=True`.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args  # must be set before anything else of comfy is imported

    args.cpu = not torch.cuda.is_available()
    args.disable_dynamic_vram = True
    args.base_directory = str(base)
    for name, value in options.items():
        setattr(args, name, value)
    import nodes

    asyncio.run(nodes.init_external_custom_nodes())
    return nodes

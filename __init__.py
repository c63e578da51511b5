"""SpargeAttn for ComfyUI: sparse attention for any diffusion model, without training.

ComfyUI loads this folder as a node pack; installed with pip it imports as `comfyui_spargeattn`.
"""

WEB_DIRECTORY = "./nodes/web"  # help pages


async def comfy_entrypoint():
    """ComfyUI's entry point. Everything is imported here, so that the package itself needs nothing."""
    from .nodes.extension import SpargeAttnExtension
    return SpargeAttnExtension()

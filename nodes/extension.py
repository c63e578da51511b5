"""What ComfyUI asks for when it loads the pack."""
from comfy_api.latest import ComfyExtension, io

from .apply import ApplySpargeAttn
from .host import keep_compiled_kernels
from .report import SpargeAttnReport


class SpargeAttnExtension(ComfyExtension):
    async def on_load(self) -> None:
        keep_compiled_kernels()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ApplySpargeAttn, SpargeAttnReport]

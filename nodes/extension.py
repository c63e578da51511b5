"""What ComfyUI asks for when it loads the pack."""
from comfy_api.latest import ComfyExtension, io

from .apply import ApplySpargeAttn
from .params_nodes import SpargeAttnLoadParams, SpargeAttnSaveParams, register_folder
from .tune import SpargeAttnTune


class SpargeAttnExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()
        return [ApplySpargeAttn, SpargeAttnTune, SpargeAttnSaveParams, SpargeAttnLoadParams]

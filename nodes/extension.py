"""What ComfyUI asks for when it loads the pack."""
from comfy_api.latest import ComfyExtension, io

from .apply_node import ApplySpargeAttn
from .benchmark_node import SpargeAttnBenchmark
from .demo_nodes import DecodeSpargeAttnDemo, EncodeSpargeAttnDemo, LoadSpargeAttnDemoModel
from .host import keep_compiled_kernels, log_fast_kernels, take_measured_configurations
from .params_nodes import SpargeAttnLoadParams, SpargeAttnSaveParams, register_folder
from .report_node import SpargeAttnReport
from .tune_node import SpargeAttnTune


class SpargeAttnExtension(ComfyExtension):
    async def on_load(self) -> None:
        keep_compiled_kernels()
        log_fast_kernels()
        take_measured_configurations()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()
        return [ApplySpargeAttn, SpargeAttnTune, SpargeAttnSaveParams, SpargeAttnLoadParams, SpargeAttnReport,
                SpargeAttnBenchmark, LoadSpargeAttnDemoModel, EncodeSpargeAttnDemo, DecodeSpargeAttnDemo]

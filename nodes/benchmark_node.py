"""The node Benchmark SpargeAttn: how fast attention is on this machine, and the fastest launch configuration."""
from __future__ import annotations

import comfy.model_management
import comfy.utils
from comfy.ldm.modules import attention
from comfy_api.latest import io, ui
from torch import Tensor

from ..kernels.benchmark import SECONDS, SHAPES, Job, Result, Shape, run
from .host import line_on_running_node, measured_file
from .log import log
from .report.benchmark_page import draw_benchmark
from .report.line import NodeLine
from .report.page import THEMES, as_image, draw_report
from .report.panels import failed_report
from .schema import CATEGORY

CUSTOM = "custom"
_PROGRESS = 1000


class SpargeAttnBenchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeAttnBenchmark",
            display_name="Benchmark SpargeAttn",
            category=CATEGORY,
            description="Times attention on your own GPU, for the shape of a model: ComfyUI's dense attention, and "
                        "SpargeAttn with all, 50, 30 and 10% of the blocks. Then it looks for the fastest launch "
                        "configuration of the kernels and keeps it for later runs. It needs no model, takes under two "
                        "minutes and can be stopped.",
            search_aliases=["benchmark attention", "measure speed", "how fast", "autotune", "launch configuration",
                            "基准测试", "基準測試", "测速", "測速"],
            is_output_node=True,
            inputs=[
                io.DynamicCombo.Input(
                    "shape",
                    options=[*(io.DynamicCombo.Option(name, []) for name in SHAPES), io.DynamicCombo.Option(CUSTOM, [
                        io.Int.Input("heads", default=24, min=1, max=512, tooltip="Attention heads of the model."),
                        io.Int.Input("head_dim", default=128, min=1, max=256, tooltip="Channels of a head."),
                        io.Int.Input("tokens", default=16384, min=1, max=1 << 20, step=256,
                                     tooltip="Tokens that attend to each other: those of the picture or clip and of "
                                             "the text."),
                    ])],
                    tooltip="The attention that is timed, by model and size. custom: one of your own."),
                io.Combo.Input(
                    "pv_precision", options=["auto", "int8", "fp16"], default="auto",
                    tooltip="Number format of the product with V, as on Apply SpargeAttn. Launch configurations are "
                            "kept for each."),
                io.Boolean.Input(
                    "tune", default=True,
                    tooltip="Also try other launch configurations of the kernels, and keep the fastest if it is more "
                            "than 2% faster than the pack's own. It is taken by all later runs on this GPU with "
                            "models of this head size. Off: only measure."),
                io.Int.Input("seconds", default=int(SECONDS), min=10, max=600, advanced=True,
                             tooltip="What the benchmark may take. If time is short, fewer launch configurations are "
                                     "tried."),
                io.Combo.Input("theme", options=list(THEMES), default="dark", advanced=True,
                               tooltip="Colours of the picture."),
            ],
            outputs=[
                io.Image.Output("report", display_name="report", tooltip="The times as a picture."),
                io.String.Output("text", display_name="text",
                                 tooltip="The times, the GPU and the versions as a table, to be pasted into an issue "
                                         "of this project."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        return float("nan")  # measures again each time

    @classmethod
    def execute(cls, shape: dict, pv_precision: str, tune: bool, seconds: int, theme: str) -> io.NodeOutput:
        progress = _Progress()
        try:
            result = run(_job(shape, pv_precision, tune, seconds), progress)
            text, image = result.text(), as_image(draw_benchmark(result, THEMES[theme]))
            shown = ui.PreviewImage(image, cls=cls).as_dict()
            progress.finish(result)
        except Exception as problem:  # the other nodes of a prompt are worth more
            log.warning("SpargeAttn: the benchmark failed", exc_info=True)
            text, shown = f"The benchmark failed: {problem}", {}
            image = as_image(draw_report(failed_report("The benchmark failed", str(problem)), THEMES[theme]))
        log.info("SpargeAttn: benchmark\n%s", text)
        return io.NodeOutput(image, text, ui={**shown, "text": [text]})


def _job(shape: dict, pv_precision: str, tune: bool, seconds: int) -> Job:
    """Takes the memory that idle models hold."""
    name = shape["shape"]
    wanted = SHAPES.get(name) or Shape(CUSTOM, shape["heads"], shape["head_dim"], shape["tokens"])
    manager, device = comfy.model_management, comfy.model_management.get_torch_device()
    if device.type != "cpu":
        manager.free_memory(wanted.bytes, device)
        manager.soft_empty_cache()
    return Job(wanted, device, _dense, f"ComfyUI's {attention.optimized_attention.__name__}",
               manager.get_free_memory(device), pv_precision, tune, measured_file(), seconds)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a model gets of ComfyUI."""
    out = attention.optimized_attention(q, k, v, q.shape[1], skip_reshape=True)
    return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


class _Progress:
    """A bar and a line on the node. Ends the benchmark where the user stops the prompt."""

    def __init__(self):
        self._bar = comfy.utils.ProgressBar(_PROGRESS)
        self._line = NodeLine(line_on_running_node())

    def __call__(self, share: float, doing: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(int(_PROGRESS * share))
        self._line.update(lambda: f"{share:.0%}: {doing}")

    def finish(self, result: Result) -> None:
        self._line.write(lambda: " · ".join(filter(None, [result.headline, result.verdict])))

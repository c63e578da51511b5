"""The node SpargeAttn Report: what happened in the last run of a patched model, as a picture and as text."""
from __future__ import annotations

import torch
from comfy.patcher_extension import CallbacksMP
from comfy_api.latest import io, ui

from .call.transformer_blocks import ListedBlocks, TransformerBlock
from .host import running_prompt
from .log import log
from .override import CALLBACK_KEY, SpargeOverride
from .report.page import THEMES, as_image, draw_report
from .report.panels import Panels, failed_report, run_report
from .run.block_maps import MapRequest
from .schema import CATEGORY


class SpargeAttnReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeAttnReport",
            display_name="SpargeAttn Report",
            category=CATEGORY,
            description="Shows what Apply SpargeAttn did in the last run: how much attention was skipped in every "
                        "block and step, which calls stayed dense and why, the time it saved, and the block map of one "
                        "head. Connect the model that goes into the sampler and the latent that comes out of it.",
            search_aliases=["sparsity", "heat map", "statistics", "why is it not faster", "block map", "报告",
                            "報告"],
            inputs=[
                io.Model.Input("model", tooltip="The patched model, as it goes into the sampler."),
                io.Latent.Input("samples", tooltip="The sampler's output: the report is made once it is there. Goes "
                                                   "through unchanged."),
                io.String.Input(
                    "block", default="", placeholder="12 or single:3",
                    tooltip="The transformer block whose block map is shown, such as 12 or single:3. Empty: the first "
                            "one that was kept."),
                io.Int.Input("head", default=0, min=0, max=255, tooltip="The attention head whose block map is shown."),
                io.Int.Input(
                    "step", default=0, min=0, max=10000,
                    tooltip="The sampling step whose block maps are kept, counted from 1; 0 is the first sparse one. A "
                            "change takes effect in the next run, because maps of one step only are kept."),
                io.Combo.Input("theme", options=list(THEMES), default="dark", tooltip="Colours of the picture."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The sampler's output, unchanged."),
                io.Image.Output("report", display_name="report", tooltip="The report as a picture."),
                io.String.Output("text", display_name="text", tooltip="The report in words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, block: str | None = None) -> bool | str:
        try:
            _one_block(block or "")
        except ValueError as problem:
            return str(problem)
        return True

    @classmethod
    def execute(cls, model, samples: dict, block: str, head: int, step: int, theme: str) -> io.NodeOutput:
        wanted = MapRequest(step, _one_block(block), head)
        try:
            panels = _panels(model, wanted)
            image, text = as_image(draw_report(panels, THEMES[theme])), panels.text()
            shown = ui.PreviewImage(image, cls=cls).as_dict()
        except Exception as problem:
            # The latent goes through this node, and a report is not worth a finished run.
            log.warning("SpargeAttn: there is no report", exc_info=True)
            image, text, shown = torch.zeros(1, 64, 64, 3), f"There is no report: {problem}", {}
        return io.NodeOutput(samples, image, text, ui={**shown, "text": [text]})


def _panels(model, wanted: MapRequest) -> Panels:
    override = find_override(model)
    if override is None:
        return failed_report("There is no Apply SpargeAttn on this model",
                             "Connect the model that leaves Apply SpargeAttn, or enable that node if it is bypassed "
                             "(Ctrl+B) or muted (Ctrl+M).")
    override.run.map_request = wanted
    return run_report(override.run.summary, override.settings, wanted, running_prompt())


def find_override(model) -> SpargeOverride | None:
    """The outermost SpargeOverride of a model, even where another override has taken its slot."""
    callbacks = model.get_callbacks(CallbacksMP.ON_PRE_RUN, CALLBACK_KEY)
    return callbacks[-1].__self__ if callbacks else None


def _one_block(text: str) -> TransformerBlock | None:
    """The transformer block that a text names, None for an empty text. Raises ValueError for anything else."""
    if not text.strip():
        return None
    ranges = ListedBlocks.parse(text).ranges
    if len(ranges) != 1 or ranges[0][1] != ranges[0][2]:
        raise ValueError(f"block must be one block, such as 12 or single:3; got '{text}'")
    kind, index, _ = ranges[0]
    return TransformerBlock(kind or "", index)

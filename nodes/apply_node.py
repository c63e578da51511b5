"""The node Apply SpargeAttn."""
from __future__ import annotations

import math

from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import io

from ..kernels import SpargeParams
from .call.model_rules import expect_tokens
from .call.plan import DENSE_STEPS, HILBERT_CHOICES, NodeSettings
from .call.transformer_blocks import ListedBlocks
from .host import line_on_running_node, running_prompt, shared_memory, unrecorded
from .log import log
from .override import CALLBACK_KEY, SLOT, SpargeOverride, describe
from .presets import CUSTOM, DEFAULTS, OF_A_NEW_NODE, PRESETS, WITHOUT, chosen
from .report.advice import about_refreshes
from .schema import (
    CATEGORY,
    SPARGE_PARAMS,
    end_percent,
    min_tokens,
    number,
    similarity_threshold,
    start_percent,
)
from .tuned.params import MOST_REFRESHES, Architecture, TunedParams

PV_THRESHOLD_OFF = 50.0
# Words that find this node and none of the others, which the editor would list before it.
SEARCH_ALIASES = ["SpargeAttention", "sage", "sage attention", "sparse attention", "block sparse", "faster attention",
                  "optimize attention", "speed up", "accelerate", "加速", "稀疏注意力"]


class ApplySpargeAttn(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplySpargeAttn",
            display_name="Apply SpargeAttn",
            category=CATEGORY,
            description="Makes the model's attention sparse and quantised, without training: blocks of the attention "
                        "map that would hardly contribute are predicted and skipped. Put it between the model loader "
                        "and the sampler, after other nodes that change attention. The longer the sequence (video, "
                        "large images), the more it gains. What happened is written to the log after each run.",
            search_aliases=SEARCH_ALIASES,
            not_idempotent=True,  # an equal node elsewhere in the graph has a line of its own
            inputs=_with_optional_widgets([
                io.Model.Input("model", tooltip="The diffusion model. Only the output is patched."),
                io.DynamicCombo.Input(
                    "selection",
                    options=[
                        io.DynamicCombo.Option("cdf", [
                            number("cdf_threshold", DEFAULTS["selection"]["cdf_threshold"], 0.01, 1.0, 0.001,
                                   "Blocks are kept until they hold this share of the predicted attention. "
                                   "Higher is closer to dense attention, lower is faster; try 0.9 to 0.99. "
                                   "Called τ in the paper, cdfthreshd in its code."),
                            similarity_threshold(),
                        ]),
                        io.DynamicCombo.Option("topk", [
                            number("keep_percent", 50.0, 0.1, 100.0, 0.1,
                                   "Keeps this share of the blocks, in percent, whatever their similarity; text "
                                   "blocks (sinks) come on top where the tokens are reordered. Speed is the same "
                                   "for every prompt, quality is not; try 30 to 60, or 10 to 20 with refreshes."),
                            similarity_threshold(),
                        ]),
                    ],
                    tooltip="How blocks are selected. cdf: as many as are needed to hold a share of the attention, "
                            "more where attention is spread out (the paper's rule). topk: the same share of them for "
                            "every prompt, whatever their similarity."),
                number("pv_threshold", PV_THRESHOLD_OFF, 1.0, PV_THRESHOLD_OFF, 0.5,
                       "Inside a kept block, groups of rows whose probabilities are all below 2^-x of the largest "
                       "one seen so far skip the product with V. 50 is off, and fastest: what could be skipped is "
                       "skipped as whole blocks already, and looking for more takes longer than it saves. "
                       "Called -λ in the paper, pvthreshd in its code.", advanced=True),
                start_percent("Sampling before this point uses dense attention. The first steps lay out the picture "
                              "and suffer most from sparse attention; 0 makes all steps sparse."),
                end_percent("Sampling after this point uses dense attention. Not below start_percent."),
                io.Combo.Input(
                    "skipped_blocks", options=["drop", "pooled"], default=DEFAULTS["skipped_blocks"],
                    tooltip="drop: skipped blocks do not count (the paper). pooled: each still counts with one average "
                            "key and value, which helps where few blocks are kept and attention is spread out."),
                io.Combo.Input(
                    "pv_precision", options=["auto", "int8", "fp16", "fp8"], default="auto", advanced=True,
                    tooltip="Number format of the product with V. auto is int8 on most NVIDIA GPUs and fp16 elsewhere. "
                            "fp8 is int8 now; it stands here for older workflows. The product of Q and K is INT8."),
                io.String.Input(
                    "dense_blocks", default="", placeholder="0, 1, 47-49", advanced=True,
                    tooltip="Transformer blocks that keep dense attention, such as 0, 1, 47-49. Where a model has "
                            "several kinds of blocks, double:0 or single:0-3 names one kind (input, middle, output for "
                            "SD 1.5 and SDXL) and a bare number means that block of each kind. The log names those "
                            "that the model does not have."),
                min_tokens("Attention over fewer tokens than this stays dense: there is nothing to gain."),
                io.Boolean.Input(
                    "verbose", default=False, advanced=True,
                    tooltip="Also write the sparsity of every block and step to the log."),
                io.Combo.Input(
                    "hilbert", options=list(HILBERT_CHOICES), default="auto", advanced=True,
                    tooltip="on: tokens are grouped into blocks along a Hilbert curve through the picture or clip, so "
                            "that those of a block are neighbours in space and time and more alike. off: the model's "
                            "own order. auto is off: where it was measured no order is the best at every threshold, "
                            "and Tune SpargeAttn chooses one for each head. Where a model's grid is not certain, the "
                            "order stays as it is."),
                io.Int.Input(
                    "refreshes", default=DEFAULTS["refreshes"], min=0, max=MOST_REFRESHES, step=1,
                    tooltip="0 is off, or as many as params were tuned for. Otherwise so many steps of the sparse part "
                            "compute dense attention and keep what sparse attention lacks of it, and the steps "
                            "between add that. The picture comes much closer to that of dense attention, so that far "
                            "fewer blocks need to be kept. It takes memory: half of q for each layer and condition, of "
                            "the GPU up to half of what is free there, then of the host (with NVIDIA and AMD) up to "
                            "half of what is free there. Needs 12 steps in the sparse part; try 4 to 6 in 20 steps, "
                            "12 in 50."),
                io.Combo.Input(
                    "dense_steps", options=list(DENSE_STEPS), default=DEFAULTS["dense_steps"],
                    tooltip="What computes dense steps: those before start_percent, those after end_percent, and "
                            "refreshes. quantised: the kernels of the sparse steps with nothing skipped, which is "
                            "faster on long sequences; where they can't run, the model's own attention. model: always "
                            "the model's own. strict: as quantised, but blocks that hold the last thousandth of the "
                            "attention are skipped and pooled, which is faster still. dense_blocks, short sequences "
                            "and models on which another node chose the attention always keep theirs."),
                SPARGE_PARAMS.Input(
                    "params", optional=True,
                    tooltip="Tuned parameters of this model. Layers they know use them, each head its own; the "
                            "thresholds, skipped_blocks, pv_precision and hilbert serve the layers they don't know. "
                            "The window of steps, dense_blocks and min_tokens stay in force."),
                io.Combo.Input(  # last, where it leaves the others in their places; the editor shows it first
                    "preset", options=[*PRESETS, CUSTOM], default=CUSTOM,
                    extra_dict={"presets": {name: preset.widgets for name, preset in PRESETS.items()},
                                "of_a_new_node": OF_A_NEW_NODE, "without": WITHOUT.widgets},
                    tooltip="Sets selection, its thresholds, start_percent, skipped_blocks, refreshes and dense_steps, "
                            "as you see. quality is the closest to dense attention, fast skips the most, balanced "
                            "lies between. Turn one of these widgets, and it becomes custom: the widgets as they are. "
                            "In a prompt (API) a preset stands for its values and those widgets are not read; without "
                            "a preset it is custom."),
            ]),
            outputs=[io.Model.Output(tooltip="The patched model; the input stays as it was.")],
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = None, *, selection: dict | None = None) -> bool | str:
        """Refuse a bad list before anything runs.

        ComfyUI shows an error at every positional argument, so that there is only one. It always passes a DynamicCombo.
        """
        try:
            ListedBlocks.parse(dense_blocks or "")
        except ValueError as problem:
            return str(problem)
        return True

    @classmethod
    def execute(cls, model, selection: dict | None = None, pv_threshold: float = PV_THRESHOLD_OFF,
                start_percent: float | None = None, end_percent: float = 1.0, skipped_blocks: str | None = None,
                pv_precision: str = "auto", dense_blocks: str = "", min_tokens: int = 2048, verbose: bool = False,
                hilbert: str = "auto", refreshes: int | None = None, dense_steps: str | None = None,
                params: TunedParams | None = None, preset: str = CUSTOM) -> io.NodeOutput:
        values, unread = chosen(preset, {"selection": selection, "start_percent": start_percent,
                                         "skipped_blocks": skipped_blocks, "refreshes": refreshes,
                                         "dense_steps": dense_steps})
        if unread:
            log.info("SpargeAttn: preset %s sets %s; the prompt's own values for these need custom: %s", preset,
                     ", ".join(unread), unread)
        start_percent = values["start_percent"]
        if start_percent > end_percent:
            raise ValueError(f"start_percent must be at most end_percent; got {start_percent:g} and {end_percent:g}")
        tuned, refreshes = _fitting(params, model), values["refreshes"]
        settings = NodeSettings(_thresholds(values["selection"], pv_threshold), start_percent, end_percent,
                                ListedBlocks.parse(dense_blocks), min_tokens, values["skipped_blocks"], pv_precision,
                                verbose, hilbert, tuned, refreshes or (tuned.refreshes if tuned else 0),
                                values["dense_steps"])
        _tell_refreshes(settings, refreshes)
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        previous = options.get(SLOT)
        if previous is not None:
            log.info("SpargeAttn: calls that stay dense go on to %s, found on the model", describe(previous))
        override = options[SLOT] = SpargeOverride(settings, previous, line_on_running_node(), shared_memory(),
                                                  unrecorded)
        override.run.running_prompt = running_prompt
        for event, callback in ((CallbacksMP.ON_PRE_RUN, override.on_pre_run),
                                (CallbacksMP.ON_PREPARE_STATE, override.on_prepare_state),
                                (CallbacksMP.ON_CLEANUP, override.on_cleanup)):
            patched.add_callback_with_key(event, CALLBACK_KEY, callback)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, CALLBACK_KEY, expect_tokens)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, CALLBACK_KEY, override.names.count)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, CALLBACK_KEY, override.run.refresh.on_sampler)
        return io.NodeOutput(patched)


def _with_optional_widgets(inputs: list[io.Input]) -> list[io.Input]:
    """For prompts that hold a preset alone, or were saved before a widget was added. All keep their order."""
    for entry in inputs:
        entry.optional = entry.id != "model"
    return inputs


def _fitting(tuned: TunedParams | None, model) -> TunedParams | None:
    """The parameters; None where they don't fit the model and the user prefers the widgets to an error."""
    if tuned is None or not (problem := tuned.architecture.mismatch(Architecture.of(model))):
        return tuned
    if not tuned.lenient:
        raise ValueError(f"params must be tuned for this model: {problem}")
    log.warning("SpargeAttn: the tuned parameters are not used: %s", problem)
    return None


def _tell_refreshes(settings: NodeSettings, given: int) -> None:
    """Log where tuned parameters brought the refreshes, and where they were tuned for others."""
    if settings.refreshes != given:
        log.info("SpargeAttn: refreshes %d, which params were tuned for", settings.refreshes)
    if note := about_refreshes(settings):
        log.info("SpargeAttn: %s", note)


def _thresholds(selection: dict, pv_threshold: float) -> SpargeParams:
    amount = {"topk": selection["keep_percent"] / 100} if selection["selection"] == "topk" else \
        {"cdf_threshold": selection["cdf_threshold"]}
    return SpargeParams(**amount, similarity_threshold=selection["similarity_threshold"],
                        pv_threshold=math.inf if pv_threshold >= PV_THRESHOLD_OFF else pv_threshold)

"""The node Tune SpargeAttn."""
from __future__ import annotations

import re
import time
from types import MappingProxyType

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ..kernels import SpargeParams
from .call.plan import NodeSettings
from .host import line_on_running_node
from .log import log
from .params_nodes import params_folder
from .report.line import NodeLine
from .report.page import as_image
from .report.tuned_page import TunedPictures
from .schema import CATEGORY, SPARGE_PARAMS, end_percent, min_tokens, number, start_percent
from .tuned import params_file
from .tuned.params import MOST_REFRESHES, Architecture, TunedParams
from .tuned.search import Bounds
from .tuner import Tuner

_PREVIEW_SIZE = 768
_PROGRESS = 1000


class SpargeAttnTune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeAttnTune",
            display_name="Tune SpargeAttn",
            category=CATEGORY,
            description="Samples once with dense attention and finds, for each layer and head, how much of it can be "
                        "skipped at an error that you choose. It takes minutes, once for a model; save the result and "
                        "give it to Apply SpargeAttn. Tune on the size of picture or clip that you use. If you stop "
                        "it, what was found is saved; connect it to params to go on.",
            search_aliases=["calibrate", "hyper-parameter search", "调优", "調優"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, from before Apply SpargeAttn."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff,
                             control_after_generate=io.ControlAfterGenerate.fixed, tooltip="Seed of the noise."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps, as you use them."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Classifier-free guidance, as you use it."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As you use it."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As you use it."),
                io.Conditioning.Input("positive", tooltip="A prompt like those that you will use."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise, of the size that you will use."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Amount of denoising."),
                number("l1", 0.05, 0.001, 0.5, 0.001,
                       "Largest error of a head when blocks are skipped: mean absolute difference to dense "
                       "attention, relative to it. Lower is closer to dense attention, higher is faster; try "
                       "0.02 to 0.08."),
                number("l2", 0.05, 0.001, 0.5, 0.001,
                       "Largest error when products with V are skipped too (pv_threshold). Up to l1, none are "
                       "skipped: on an H100 looking for them takes more time than it saves."),
                io.Int.Input(
                    "sampled_steps", default=3, min=1, max=100,
                    tooltip="Number of sampling steps that are searched, spread over the window. More takes longer "
                            "and makes the result safer."),
                start_percent("As on Apply SpargeAttn: earlier steps are not searched."),
                end_percent("As on Apply SpargeAttn: later steps are not searched. Not below start_percent."),
                io.Boolean.Input(
                    "evaluate", default=True,
                    tooltip="Sample a second time with another seed (and other_positive, if connected) and report the "
                            "error there too. If it is much larger than the first, tune on more prompts."),
                io.Float.Input(
                    "min_gain", default=0.1, min=0.0, max=0.9, step=0.01, advanced=True,
                    tooltip="Heads of which less than this share can be skipped keep every block."),
                min_tokens("As on Apply SpargeAttn: shorter sequences are not searched."),
                io.Int.Input(  # optional, so that prompts saved without it still run
                    "refreshes", default=0, min=0, max=MOST_REFRESHES, step=1, optional=True, advanced=True,
                    tooltip="As you will use it on Apply SpargeAttn. The error is then measured where it is used, on "
                            "steps between refreshes with what the refresh found missing, so that far more can be "
                            "skipped. The parameters hold for runs with refreshes alone. The search takes two to "
                            "three times as long and keeps the calls of up to two refreshes in ordinary memory, up to "
                            "half of what is free."),
                SPARGE_PARAMS.Input(
                    "params", optional=True,
                    tooltip="Parameters of an earlier search, to go on with on this prompt: what is found then holds "
                            "for all prompts. l1, l2, min_gain and refreshes must be those of the earlier search."),
                io.Conditioning.Input("other_positive", optional=True,
                                      tooltip="Another prompt, for the evaluation alone."),
            ],
            outputs=[SPARGE_PARAMS.Output(display_name="params", tooltip="For Apply SpargeAttn and Save."),
                     io.Latent.Output(display_name="latent", tooltip="The sampled latent, with dense attention."),
                     io.Image.Output(display_name="report", tooltip="Sparsity and error of every layer and head.")],
        )

    @classmethod
    def validate_inputs(cls, start_percent: float | None = None, end_percent: float | None = None) -> bool | str:
        """Refuse an empty window before anything runs.

        ComfyUI shows the error at both inputs. It leaves the check of inputs that this method takes to this method.
        """
        if start_percent is None or end_percent is None:  # given by another node
            return True
        if not 0 <= start_percent <= end_percent <= 1:
            return (f"start_percent must be at most end_percent, both in 0 … 1; got {start_percent:g} "
                    f"and {end_percent:g}")
        return True

    @classmethod
    def execute(cls, model, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive, negative,
                latent_image: dict, denoise: float, l1: float, l2: float, sampled_steps: int, start_percent: float,
                end_percent: float, evaluate: bool, min_gain: float, min_tokens: int, refreshes: int = 0,
                params: TunedParams | None = None, other_positive=None) -> io.NodeOutput:
        draw = TunedPictures()
        progress = _Progress(2 if evaluate else 1, draw)
        settings = NodeSettings(SpargeParams(), start_percent, end_percent, min_tokens=min_tokens, refreshes=refreshes)
        tuner = Tuner(_beginning(params, model, Bounds(l1, max(l1, l2), min_gain), refreshes), settings, sampled_steps,
                      lambda share: progress(tuner, share),
                      comfy.model_management.throw_exception_if_processing_interrupted)

        def sample(seed: int, positive) -> dict:
            return _sample(tuner.patch(model), seed, steps, cfg, sampler_name, scheduler, positive, negative,
                           latent_image, denoise)

        try:
            latent = sample(seed, positive)
            if not tuner.searched:
                raise ValueError(f"no attention call of this model could be tuned with min_tokens {min_tokens}: "
                                 + ("; ".join(sorted(tuner.said)) or "none arrived"))
            if evaluate:
                tuner.learn = False
                sample(seed ^ 1, positive if other_positive is None else other_positive)
            progress.finish(tuner)
        except BaseException:  # ComfyUI's interruption is no Exception
            _keep_unfinished(tuner)
            raise
        log.info("SpargeAttn: tuned: %s", tuner.tuned)
        return io.NodeOutput(tuner.tuned, latent, as_image(draw(tuner.tuned)))


class _Progress:
    """Shows on the node how far a search is: a bar, a picture of what has been found, and the time left."""

    def __init__(self, runs: int, draw: TunedPictures):
        """
        runs: number of times that the model is sampled.
        """
        self._runs, self._draw = runs, draw
        self._bar = comfy.utils.ProgressBar(_PROGRESS)
        self._pictured = 0  # calls that the last picture had
        self._began: float | None = None  # once the model is loaded
        self._line = NodeLine(line_on_running_node())

    def __call__(self, tuner: Tuner, share: float) -> None:
        """
        share: of the current run that is done.
        """
        done = (share + (not tuner.learn)) / self._runs
        preview = ("JPEG", self._draw(tuner.tuned), _PREVIEW_SIZE) if tuner.searched > self._pictured else None
        self._pictured = tuner.searched
        self._bar.update_absolute(int(_PROGRESS * done), _PROGRESS, preview)
        now = time.monotonic()
        if self._began is None:
            self._began = now
        elif done > 0:
            doing = "searching" if tuner.learn else "measuring the error with another seed"
            left = _duration((now - self._began) * (1 - done) / done)
            self._line.update(lambda: f"{doing}: {done:.0%}, about {left} left")

    def finish(self, tuner: Tuner) -> None:
        self._bar.update_absolute(_PROGRESS)
        self._line.write(lambda: f"tuned: {tuner.tuned.sparsity:.1%} of the attention can be skipped")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _beginning(earlier: TunedParams | None, model, bounds: Bounds, refreshes: int) -> TunedParams:
    """What the search starts from. Raises ValueError where it can't go on from `earlier`."""
    architecture = Architecture.of(model)
    device = model.load_device
    if earlier is None:
        return TunedParams(architecture, bounds, versions=MappingProxyType(params_file.versions(device)),
                           refreshes=refreshes)
    problem = earlier.architecture.mismatch(architecture)
    if problem:
        raise ValueError(f"params must be tuned for this model: {problem}")
    if not earlier.continues:
        raise ValueError("params must come from a search with the same candidates to be continued; these come from "
                         "another version, and Apply SpargeAttn alone can use them")
    if earlier.bounds != bounds:
        raise ValueError(f"l1, l2 and min_gain must be those of params, {earlier.bounds}; got {bounds}")
    if earlier.refreshes != refreshes:
        raise ValueError(f"refreshes must be those of params, {earlier.refreshes}; got {refreshes}")
    return earlier


def _sample(model, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive, negative,
            latent: dict, denoise: float) -> dict:
    """Sample as ComfyUI's KSampler does, without its progress: the search has its own."""
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    with torch.inference_mode():
        samples = comfy.sample.sample(model, noise, steps, cfg, sampler_name, scheduler, positive, negative, samples,
                                      denoise=denoise, noise_mask=latent.get("noise_mask"), seed=seed,
                                      disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED)
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**out, "samples": samples}


def _keep_unfinished(tuner: Tuner) -> None:
    """Save what a search had found when it, or its evaluation, was stopped. The file has a name of its own."""
    if not tuner.searched:
        return
    family = re.sub(r"\W", "_", tuner.tuned.architecture.family, flags=re.ASCII)[:80]
    try:
        path = params_file.save(tuner.tuned, params_folder(), f"unfinished_{family}")
    except Exception:  # what stopped the search has to reach ComfyUI, whatever becomes of the file
        log.exception("SpargeAttn: what the search found can't be saved")
        return
    message = f"the search was stopped; what it found is in {path.name}, and goes on from there through params"
    log.warning("SpargeAttn: %s", message)
    NodeLine(line_on_running_node()).write(lambda: message)

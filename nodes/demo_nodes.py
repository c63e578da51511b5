"""What an example needs to run without a download: a small trained video model, its prompts, and pictures of its clips.

The model has no text encoder and no VAE. These nodes take their place; the sampler and the rest are ComfyUI's own.
"""
from pathlib import Path

import comfy.sd
import torch
from comfy.latent_formats import Wan21
from comfy.utils import common_upscale
from comfy_api.latest import io

from .demo.words import SCENES, encode, prompt
from .schema import CATEGORY

DEMO = f"{CATEGORY}/demo"
WEIGHTS = Path(__file__).parent / "demo/wan_shapes.safetensors"
PIXELS = 8  # a latent's pixel covers as many of the clip's, in each direction


class LoadSpargeAttnDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSpargeAttnDemoModel",
            display_name="Load SpargeAttn Demo Model",
            category=DEMO,
            description="Loads the small video model that comes with this pack, to try SpargeAttn without a download. "
                        "It has Wan 2.1's architecture and 5.8 million weights, and draws moving shapes.",
            inputs=[],
            outputs=[io.Model.Output(display_name="model", tooltip="For Apply SpargeAttn or a sampler.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(comfy.sd.load_diffusion_model(str(WEIGHTS)))


class EncodeSpargeAttnDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EncodeSpargeAttnDemo",
            display_name="Encode SpargeAttn Demo",
            category=DEMO,
            description="The prompt of the demo's model, in place of a text encoder: the shapes that move through the "
                        "clip.",
            inputs=[io.Combo.Input("scene", options=list(SCENES), tooltip="What the clip shows.")],
            outputs=[io.Conditioning.Output(display_name="conditioning",
                                            tooltip="For the sampler; through ConditioningZeroOut also its negative.")],
        )

    @classmethod
    def execute(cls, scene: str) -> io.NodeOutput:
        return io.NodeOutput([[encode(prompt(*SCENES[scene])[None]), {}]])


class DecodeSpargeAttnDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DecodeSpargeAttnDemo",
            display_name="Decode SpargeAttn Demo",
            category=DEMO,
            description="Turns a clip of the demo's model into pictures, in place of a VAE: as ComfyUI's previews do, "
                        "by the share of every latent channel in red, green and blue.",
            inputs=[io.Latent.Input("samples", tooltip="The sampler's output.")],
            outputs=[io.Image.Output(display_name="images",
                                     tooltip="One picture for every four frames of the latent's length.")],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        latent, wan = samples["samples"].float(), Wan21()
        if latent.ndim != 5 or latent.shape[1] != wan.latent_channels:
            raise ValueError(f"samples must be a clip of the demo's model, of shape (B, {wan.latent_channels}, T, H, "
                             f"W); got {tuple(latent.shape)}")
        latent = wan.process_in(latent).transpose(1, 2).flatten(0, 1)  # (pictures, channels, height, width)
        factors, bias = (torch.tensor(x, device=latent.device) for x in (wan.latent_rgb_factors,
                                                                         wan.latent_rgb_factors_bias))
        rgb = torch.einsum("nchw,cr->nrhw", latent, factors) + bias.view(-1, 1, 1)
        height, width = latent.shape[-2:]
        large = common_upscale(rgb / 2 + 0.5, width * PIXELS, height * PIXELS, "bicubic", "disabled")
        return io.NodeOutput(large.clamp(0, 1).movedim(1, -1))

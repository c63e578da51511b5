"""Tiny randomly initialised models of the families ComfyUI knows, saved as checkpoints its own loaders accept.

A family is built with ComfyUI's model class, filled with seeded random weights of a scale that keeps activations
finite, saved as safetensors, and loaded by `comfy.sd.load_diffusion_model`, which detects it from the keys and shapes.
This module is imported before ComfyUI is started.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

if __package__:  # for tests/soak, which is a package
    from . import builders
else:
    import builders

MIN_TOKENS = 512


@dataclass(frozen=True)
class Family:
    """One model architecture at test size.

    `latent`: the sampler's latent shape. `tokens`: length of its self- or joint-attention calls (text included).
    `calls`: how many calls of at least `MIN_TOKENS` one model call makes. `context`: (length, width) of the text
    condition; `pooled`: width of its pooled vector; `text_mask`: whether its text encoder also gives a mask.
    `detected`: entries that replace what detection finds, where detection fixes a full size (comfy reads no other
    source for them); `metadata` is the `config` entry that ComfyUI itself reads from a checkpoint. `audio`: shape of
    the latent that is sampled beside that of the video; `batches`: whether the model takes more than one sample.
    """

    name: str
    build: Callable
    latent: tuple
    tokens: int
    calls: int
    context: tuple
    pooled: int | None = None
    text_mask: bool = False
    metadata: dict = field(default_factory=dict)
    detected: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    audio: tuple | None = None
    batches: bool = True

    def latents(self, video):
        """`video` (B, …) with as many seeded audio latents beside it, as the samplers of this family take them."""
        if self.audio is None:
            return video
        from comfy.nested_tensor import NestedTensor

        audio = torch.randn(self.audio, generator=torch.Generator().manual_seed(3)).expand(len(video), -1, -1, -1)
        return NestedTensor((video, audio.clone()))


# By the family of the model; the loader takes those of the other families at their full size alone.
VAES = {"wan": builders.wan_vae, "wan_image": builders.wan_vae, "qwen_image": builders.wan_vae,
        "ltxv": builders.ltxv_vae, "flux": partial(builders.tiny_autoencoder, 16),
        "sd3.5": partial(builders.tiny_autoencoder, 16), "sdxl": partial(builders.tiny_autoencoder, 4)}

WAN_CONFIG = {"num_heads": 2, "text_dim": 64}
FAMILIES = {family.name: family for family in (
    Family("wan", builders.wan, (1, 16, 3, 32, 32), 768, 2, (48, 64), metadata=WAN_CONFIG),
    Family("wan_image", builders.wan_image, (1, 16, 3, 32, 32), 768, 2, (48, 64), metadata=WAN_CONFIG),
    Family("wan2.2_5b", partial(builders.wan, in_dim=48, out_dim=48), (1, 48, 3, 32, 32), 768, 2, (48, 64),
           metadata=WAN_CONFIG),
    Family("wan_s2v", builders.wan_s2v, (1, 16, 3, 32, 32), 768, 2, (48, 64), metadata=builders.WAN_S2V_CONFIG),
    Family("wan_animate", builders.wan_animate, (1, 16, 3, 32, 32), 768, 5, (48, 64), metadata=WAN_CONFIG),
    Family("flux", builders.flux, (1, 16, 48, 48), 48 + 576, 3, (48, 64), pooled=32),
    Family("flux2", builders.flux2, (1, 128, 24, 24), 512 + 576, 3, (48, 64)),
    Family("sd3.5", builders.sd3, (1, 16, 48, 48), 48 + 576, 3, (48, 64), pooled=64),
    Family("hunyuan_video", builders.hunyuan_video, (1, 16, 3, 32, 32), 48 + 768, 2, (48, 64), pooled=768),
    Family("hunyuan_video_1.5", builders.hunyuan_video_15, (1, 32, 3, 16, 16), 48 + 768, 2, (48, 64), pooled=768),
    Family("minimax_h3", builders.minimax_h3, (1, 24, 3, 32, 32), 48 + 2 * 15 + 768, 2, (48, 64),
           audio=(1, 32, 2, 15), batches=False),
    Family("ltxv", builders.ltxv, (1, 128, 3, 16, 16), 768, 2, (48, 64), text_mask=True,
           metadata=builders.LTXV_CONFIG),
    Family("ltx2", builders.ltx2, (1, 128, 3, 16, 16), 768, 2, (48, 64), audio=(1, 8, 25, 16),
           metadata=builders.LTX2_CONFIG),
    Family("sdxl", builders.sdxl, (1, 4, 48, 48), 576, 2, (77, 2048), pooled=1280, dtype=torch.float16),
    Family("lumina2", builders.lumina2, (1, 16, 48, 48), 48 + 576, 4, (48, 64), detected=builders.LUMINA2_CONFIG),
    Family("z_image", builders.z_image, (1, 16, 48, 48), 64 + 576, 3, (48, 64), detected=builders.Z_IMAGE_CONFIG),
    Family("qwen_image", builders.qwen_image, (1, 16, 1, 48, 48), 48 + 576, 2, (48, 64),
           detected=builders.QWEN_CONFIG),
    Family("mochi", builders.mochi, (1, 12, 3, 32, 32), 48 + 768, 2, (48, 64), text_mask=True,
           detected=builders.MOCHI_CONFIG),
    Family("kandinsky5", builders.kandinsky5, (1, 16, 3, 32, 32), 768, 2, (48, 64), pooled=32,
           detected=builders.KANDINSKY5_CONFIG),
    Family("cosmos", builders.cosmos, (1, 16, 3, 32, 32), 768, 2, (48, 64), detected=builders.COSMOS_CONFIG),
    Family("cosmos_image", partial(builders.cosmos, 17), (1, 16, 3, 32, 32), 768, 2, (48, 64),
           detected=builders.COSMOS_CONFIG),
    Family("cosmos_predict2", builders.cosmos_predict2, (1, 16, 3, 32, 32), 768, 2, (48, 64),
           detected=builders.COSMOS_CONFIG),
    Family("cosmos_predict2_image", partial(builders.cosmos_predict2, 17), (1, 16, 3, 32, 32), 768, 2, (48, 64),
           detected=builders.COSMOS_CONFIG),
)}


def random_weights(module, seed, dtype, device="cpu"):
    """Seeded values for every entry of the module's state dict: unit-gain matrices, norm scales near one.

    The module itself may be on the meta device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for key, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, device=device)
        if key.endswith("pad_token"):  # as large as other tokens, lest what they attend to stands out
            noise *= 20 * value[0].numel() ** -0.5
        elif value.ndim >= 2:
            noise *= value[0].numel() ** -0.5
        elif key.endswith(("weight", "scale")):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.02
        weights[key] = noise.to(dtype)
    return weights


def write(family, path, seed=0):
    """Save a random checkpoint of `family` at `path`."""
    from safetensors.torch import save_file

    config = {"transformer": family.metadata, "detected": family.detected}
    save_file(random_weights(family.build(), seed, family.dtype), path, metadata={"config": json.dumps(config)})


def write_vae(name, path):
    """Save a random VAE for the latents of the family `name`."""
    from safetensors.torch import save_file

    metadata = {"config": json.dumps({"vae": builders.LTXV_VAE_CONFIG})}  # other families' loaders don't read it
    save_file(random_weights(VAES[name](), 0, torch.float32), path, metadata=metadata)


def load(family, path, monkeypatch):
    """Load `path` through ComfyUI's loader; returns its ModelPatcher."""
    import comfy.model_detection
    import comfy.sd

    if family.detected:
        detect = comfy.model_detection.detect_unet_config
        monkeypatch.setattr(comfy.model_detection, "detect_unet_config",
                            lambda *args, **kwargs: {**detect(*args, **kwargs), **family.detected})
    return comfy.sd.load_diffusion_model(str(path))


def written(family, folder, monkeypatch=None):
    """`load` of a checkpoint of the family that is written into `folder` first."""
    path = folder / f"{family.name}.safetensors"
    write(family, path)
    return load(family, path, monkeypatch)

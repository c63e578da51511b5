"""Tiny randomly initialised models of the families ComfyUI knows, saved as checkpoints its own loaders accept.

A family is built with ComfyUI's model class, filled with seeded random weights of a scale that keeps activations
finite, saved as safetensors, and loaded by `comfy.sd.load_diffusion_model`, which detects it from the keys and shapes.
Imports of ComfyUI stay inside the builders: this module is imported before ComfyUI is started.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

MIN_TOKENS = 512


@dataclass(frozen=True)
class Family:
    """One model architecture at test size.

    `latent`: the sampler's latent shape. `tokens`: length of its self- or joint-attention calls (text included).
    `calls`: how many calls of at least `MIN_TOKENS` one model call makes. `context`: (length, width) of the text
    condition; `pooled`: width of its pooled vector; `text_mask`: whether its text encoder also gives a mask.
    `detected`: entries that replace what detection finds, where detection fixes a full size (comfy reads no other
    source for them); `metadata` is the `config` entry that ComfyUI itself reads from a checkpoint.
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


def operations():
    """What every model class of ComfyUI is built with."""
    import comfy.ops

    return {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}


def _wan(**options):
    from comfy.ldm.wan.model import WanModel

    return WanModel(dim=256, ffn_dim=256, num_heads=2, num_layers=2, text_dim=64, freq_dim=256, **options,
                    **operations())


def _wan_image():
    """As the experts of Wan 2.2: beside the noise, a mask and the picture's latent."""
    return _wan(in_dim=16 + 4 + 16)


def _flux():
    from comfy.ldm.flux.model import Flux

    return Flux(in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=256, mlp_ratio=4.0,
                num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
                qkv_bias=True, guidance_embed=False, txt_ids_dims=[], **operations())


def _sd3():
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    # One dual-attention block as in SD3.5 medium: its image tokens also attend among themselves.
    return OpenAISignatureMMDITWrapper(
        input_size=None, in_channels=16, out_channels=16, depth=2, adm_in_channels=64, num_patches=48 * 48,
        pos_embed_max_size=48, qk_norm="rms", x_block_self_attn_layers=[0],
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        **operations())


def _hunyuan_video(**options):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    options = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "patch_size": [1, 2, 2], "byt5": False,
               "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False, "depth": 1,
               "depth_single_blocks": 1, **options}
    return HunyuanVideo(context_in_dim=64, hidden_size=128, mlp_ratio=4.0, num_heads=1, axes_dim=[16, 56, 56],
                        theta=256, qkv_bias=True, guidance_embed=False, meanflow=False, **options, **operations())


def _hunyuan_video_15():
    """Beside the noise, a mask and the latent of a picture; its kinds of tokens are told apart."""
    return _hunyuan_video(in_channels=32 + 1 + 32, out_channels=32, vec_in_dim=None, patch_size=[1, 1, 1], byt5=True,
                          use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, depth=2,
                          depth_single_blocks=0)


LTXV_CONFIG = {"num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 64}


def _ltxv():
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(num_layers=2, **LTXV_CONFIG, **operations())


def _sdxl():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    # KOALA's depths at one width: detection fixes 320 channels, the depths, and the condition's widths.
    return UNetModel(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1, 1],
                     channel_mult=(1, 1, 1), num_heads=-1, num_head_channels=64, use_spatial_transformer=True,
                     transformer_depth=[0, 2, 5], transformer_depth_output=[0] * 6, transformer_depth_middle=-1,
                     context_dim=2048, num_classes="sequential", adm_in_channels=2816,
                     use_linear_in_transformer=True, legacy=False, **operations())


LUMINA2_CONFIG = {"n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
                  "ffn_dim_multiplier": 1.0}


def _lumina2():
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT(in_channels=16, dim=192, n_layers=2, qk_norm=True, cap_feat_dim=64, **LUMINA2_CONFIG,
                   **operations())


QWEN_CONFIG = {"num_attention_heads": 2, "joint_attention_dim": 64}


def _qwen_image():
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=2, **QWEN_CONFIG, **operations())


# Mochi's class insists on a feed-forward width of 12288.
MOCHI_CONFIG = {"depth": 2, "num_heads": 2, "hidden_size_x": 256, "hidden_size_y": 128, "t5_feat_dim": 64,
                "mlp_ratio_x": 48.0}


def _mochi():
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    return AsymmDiTJoint(patch_size=2, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12,
                         qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True,
                         posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False,
                         timestep_scale=1000.0, use_t5=True, t5_token_length=256, rope_theta=10000.0,
                         **MOCHI_CONFIG, **operations())


def _wan_vae():
    from comfy.ldm.wan.vae import WanVAE

    return WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])


def _tiny_autoencoder(channels):
    from comfy.taesd.taesd import TAESD

    return TAESD(latent_channels=channels)


LTXV_VAE_CONFIG = {"dims": 3, "latent_channels": 128, "patch_size": 4, "norm_layer": "pixel_norm",
                   "latent_log_var": "uniform", "encoder_base_channels": 32, "decoder_base_channels": 32,
                   "blocks": [["compress_all", 1], ["compress_all", 1], ["compress_all", 1], ["res_x", 1]]}


def _ltxv_vae():
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    return VideoVAE(config=LTXV_VAE_CONFIG)


# By the family of the model; the loader takes those of the other families at their full size alone.
VAES = {"wan": _wan_vae, "wan_image": _wan_vae, "qwen_image": _wan_vae, "ltxv": _ltxv_vae,
        "flux": partial(_tiny_autoencoder, 16), "sd3.5": partial(_tiny_autoencoder, 16),
        "sdxl": partial(_tiny_autoencoder, 4)}

FAMILIES = {family.name: family for family in (
    Family("wan", _wan, (1, 16, 3, 32, 32), 768, 2, (48, 64), metadata={"num_heads": 2, "text_dim": 64}),
    Family("wan_image", _wan_image, (1, 16, 3, 32, 32), 768, 2, (48, 64), metadata={"num_heads": 2, "text_dim": 64}),
    Family("flux", _flux, (1, 16, 48, 48), 48 + 576, 3, (48, 64), pooled=32),
    Family("sd3.5", _sd3, (1, 16, 48, 48), 48 + 576, 3, (48, 64), pooled=64),
    Family("hunyuan_video", _hunyuan_video, (1, 16, 3, 32, 32), 48 + 768, 2, (48, 64), pooled=768),
    Family("hunyuan_video_1.5", _hunyuan_video_15, (1, 32, 3, 16, 16), 48 + 768, 2, (48, 64), pooled=768),
    Family("ltxv", _ltxv, (1, 128, 3, 16, 16), 768, 2, (48, 64), text_mask=True, metadata=LTXV_CONFIG),
    Family("sdxl", _sdxl, (1, 4, 48, 48), 576, 2, (77, 2048), pooled=1280, dtype=torch.float16),
    Family("lumina2", _lumina2, (1, 16, 48, 48), 48 + 576, 4, (48, 64), detected=LUMINA2_CONFIG),
    Family("qwen_image", _qwen_image, (1, 16, 1, 48, 48), 48 + 576, 2, (48, 64), detected=QWEN_CONFIG),
    Family("mochi", _mochi, (1, 12, 3, 32, 32), 48 + 768, 2, (48, 64), text_mask=True, detected=MOCHI_CONFIG),
)}


def random_weights(module, seed, dtype, device="cpu"):
    """Seeded values for every entry of the module's state dict: unit-gain matrices, norm scales near one.

    The module itself may be on the meta device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for key, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, device=device)
        if value.ndim >= 2:
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

    metadata = {"config": json.dumps({"vae": LTXV_VAE_CONFIG})}  # other families' loaders don't read it
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

"""Small models of the classes that ComfyUI knows, with their VAEs: what `checkpoints` saves.

Imports of ComfyUI stay inside the builders: this module is imported before ComfyUI is started.
"""
import torch


def operations():
    """What every model class of ComfyUI is built with."""
    import comfy.ops

    return {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}


WAN = {"dim": 256, "ffn_dim": 256, "num_layers": 2, "freq_dim": 256}


def wan(**options):
    from comfy.ldm.wan.model import WanModel

    return WanModel(**WAN, num_heads=2, text_dim=64, **options, **operations())


def wan_image():
    """As the experts of Wan 2.2: beside the noise, a mask and the picture's latent."""
    return wan(in_dim=16 + 4 + 16)


def flux():
    from comfy.ldm.flux.model import Flux

    return Flux(in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=256, mlp_ratio=4.0,
                num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
                qkv_bias=True, guidance_embed=False, txt_ids_dims=[], **operations())


def sd3():
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    # One dual-attention block as in SD3.5 medium: its image tokens also attend among themselves.
    return OpenAISignatureMMDITWrapper(
        input_size=None, in_channels=16, out_channels=16, depth=2, adm_in_channels=64, num_patches=48 * 48,
        pos_embed_max_size=48, qk_norm="rms", x_block_self_attn_layers=[0],
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        **operations())


def hunyuan_video(**options):
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    options = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "patch_size": [1, 2, 2], "byt5": False,
               "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False, "depth": 1,
               "depth_single_blocks": 1, **options}
    return HunyuanVideo(context_in_dim=64, hidden_size=128, mlp_ratio=4.0, num_heads=1, axes_dim=[16, 56, 56],
                        theta=256, qkv_bias=True, guidance_embed=False, meanflow=False, **options, **operations())


def hunyuan_video_15():
    """Beside the noise, a mask and the latent of a picture; its kinds of tokens are told apart."""
    return hunyuan_video(in_channels=32 + 1 + 32, out_channels=32, vec_in_dim=None, patch_size=[1, 1, 1], byt5=True,
                          use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, depth=2,
                          depth_single_blocks=0)


LTXV_CONFIG = {"num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 64}


def ltxv():
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(num_layers=2, **LTXV_CONFIG, **operations())


def sdxl():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    # KOALA's depths at one width: detection fixes 320 channels, the depths, and the condition's widths.
    return UNetModel(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1, 1],
                     channel_mult=(1, 1, 1), num_heads=-1, num_head_channels=64, use_spatial_transformer=True,
                     transformer_depth=[0, 2, 5], transformer_depth_output=[0] * 6, transformer_depth_middle=-1,
                     context_dim=2048, num_classes="sequential", adm_in_channels=2816,
                     use_linear_in_transformer=True, legacy=False, **operations())


LUMINA2_CONFIG = {"n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
                  "ffn_dim_multiplier": 1.0}


def lumina2():
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT(in_channels=16, dim=192, n_layers=2, qk_norm=True, cap_feat_dim=64, **LUMINA2_CONFIG,
                   **operations())


QWEN_CONFIG = {"num_attention_heads": 2, "joint_attention_dim": 64}


def qwen_image():
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=2, **QWEN_CONFIG, **operations())


# Mochi's class insists on a feed-forward width of 12288.
MOCHI_CONFIG = {"depth": 2, "num_heads": 2, "hidden_size_x": 256, "hidden_size_y": 128, "t5_feat_dim": 64,
                "mlp_ratio_x": 48.0}


def mochi():
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    return AsymmDiTJoint(patch_size=2, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12,
                         qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True,
                         posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False,
                         timestep_scale=1000.0, use_t5=True, t5_token_length=256, rope_theta=10000.0,
                         **MOCHI_CONFIG, **operations())


def wan_s2v():
    """Speech to video: the first layer takes audio."""
    from comfy.ldm.wan.model import WanModel_S2V

    return WanModel_S2V(**WAN, **WAN_S2V_CONFIG, **operations())


WAN_S2V_CONFIG = {"num_heads": 2, "text_dim": 64, "audio_inject_layers": [0]}


def wan_animate():
    """Five layers, the fewest with an adapter for faces. The large encoder of faces is left out."""
    from comfy.ldm.wan.model_animate import AnimateWanModel

    model = AnimateWanModel(**{**WAN, "num_layers": 5}, in_dim=16 + 4 + 16, num_heads=2, text_dim=64, **operations())
    del model.motion_encoder
    return model


def minimax_h3():
    """Its 56 heads of 128, and its other widths, are read from the checkpoint."""
    from comfy.ldm.minimax.model import MiniMaxH3Model

    return MiniMaxH3Model(hidden_size=128, num_layers=2, token_refiner_num_layers=1, num_attention_heads=2,
                          attention_head_dim=128, ffn_hidden_size=128, text_dim=64, timestep_input_dim=64,
                          time_embed_hidden_size=64, time_embed_dim=64, **operations())


LTX2_CONFIG = {"num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 64,
               "audio_num_attention_heads": 2, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 64,
               "connector_num_attention_heads": 1, "connector_attention_head_dim": 64, "connector_num_layers": 1}


def ltx2():
    """Video and audio attend to themselves and to each other."""
    from comfy.ldm.lightricks.av_model import LTXAVModel

    return LTXAVModel(num_layers=2, **LTX2_CONFIG, **operations())


def flux2():
    from comfy.ldm.flux.model import Flux

    return Flux(in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=64, hidden_size=256, mlp_ratio=3.0,
                num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1,
                qkv_bias=False, guidance_embed=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
                txt_ids_dims=[3], **operations())


Z_IMAGE_CONFIG = {"n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
                  "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0,
                  "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}


def z_image():
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT(in_channels=16, dim=256, n_layers=2, qk_norm=True, cap_feat_dim=64, **Z_IMAGE_CONFIG,
                   **operations())


KANDINSKY5_CONFIG = {"in_text_dim": 64, "in_text_dim2": 32}


def kandinsky5():
    from comfy.ldm.kandinsky5.model import Kandinsky5

    return Kandinsky5(model_dim=128, time_dim=64, ff_dim=128, num_text_blocks=1, num_visual_blocks=2,
                      visual_embed_dim=4 * (16 + 16 + 1), **KANDINSKY5_CONFIG, **operations())


COSMOS_CONFIG = {"num_heads": 2, "crossattn_emb_channels": 64, "adaln_lora_dim": 32, "max_img_h": 64, "max_img_w": 64,
                 "max_frames": 16, "num_blocks": 2}


def cosmos(in_channels=16):
    """With 17 channels it has a mask beside the noise and starts from a picture; so has the next."""
    from comfy.ldm.cosmos.model import GeneralDIT

    return GeneralDIT(in_channels=in_channels, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=256,
                      block_config="FA-CA-MLP", concat_padding_mask=True, pos_emb_cls="rope3d",
                      pos_emb_learnable=False, block_x_format="THWBD", affline_emb_norm=True, use_adaln_lora=True,
                      extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable",
                      **COSMOS_CONFIG, **operations())


def cosmos_predict2(in_channels=16):
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    return MiniTrainDIT(in_channels=in_channels, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=256,
                        concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_learnable=True,
                        use_adaln_lora=True, **COSMOS_CONFIG, **operations())


def wan_vae():
    from comfy.ldm.wan.vae import WanVAE

    return WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])


def tiny_autoencoder(channels):
    from comfy.taesd.taesd import TAESD

    return TAESD(latent_channels=channels)


LTXV_VAE_CONFIG = {"dims": 3, "latent_channels": 128, "patch_size": 4, "norm_layer": "pixel_norm",
                   "latent_log_var": "uniform", "encoder_base_channels": 32, "decoder_base_channels": 32,
                   "blocks": [["compress_all", 1], ["compress_all", 1], ["compress_all", 1], ["res_x", 1]]}


def ltxv_vae():
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    return VideoVAE(config=LTXV_VAE_CONFIG)

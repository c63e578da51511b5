"""Small models of the families of which no tiny checkpoint passes ComfyUI's detection: their classes on their own."""
import importlib
from dataclasses import dataclass

import torch
from builders import operations
from checkpoints import random_weights


@dataclass(frozen=True)
class Bare:
    """path: of the class under comfy.ldm. config: what it is built with. latent: a shape. text: its length."""

    path: str
    config: dict
    latent: tuple
    patch: tuple = (1, 2, 2)
    text: int = 40
    conds: dict | None = None  # (…) tensors, repeated for the batch; latents too

    def build(self):
        module, name = self.path.rsplit(".", 1)
        config = {**self.config, **operations()}
        model = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(**config)
        model.load_state_dict(random_weights(model, 0, torch.float32))
        return model.eval().requires_grad_(False)


WAN = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 64, "freq_dim": 256}
COSMOS = {"max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
          "patch_temporal": 1, "model_channels": 128, "num_blocks": 1, "num_heads": 1, "crossattn_emb_channels": 64,
          "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 32}
VIDEO, IMAGE = (1, 16, 3, 32, 36), (1, 16, 48, 44)  # height and width can be told apart
BARE = {
    "wan_reference": Bare("wan.model.WanModel", {**WAN, "in_dim_ref_conv": 16}, VIDEO,
                          conds={"reference_latent": torch.zeros(16, 32, 36)}),
    "wan_vace": Bare("wan.model.VaceWanModel", {**WAN, "vace_layers": 1, "vace_in_dim": 96}, VIDEO,
                     conds={"vace_context": torch.zeros(1, 96, 3, 32, 36), "vace_strength": (1.0,)}),
    "wan_camera": Bare("wan.model.CameraWanModel", WAN, VIDEO),
    "wan_humo": Bare("wan.model.HumoWanModel", WAN, VIDEO, conds={"reference_latent": torch.zeros(16, 1, 32, 36)}),
    "wan_scail": Bare("wan.model.SCAILWanModel", {**WAN, "in_dim": 16}, VIDEO,
                      conds={"reference_latent": torch.zeros(16, 1, 32, 36),
                             "pose_latents": torch.zeros(16, 3, 16, 16)}),
    "cogvideox": Bare("cogvideo.model.CogVideoXTransformer3DModel",
                      {"num_attention_heads": 2, "text_embed_dim": 64, "num_layers": 1, "max_text_seq_length": 40,
                       "use_rotary_positional_embeddings": True}, (1, 16, 3, 31, 32)),
    "cogvideox1.5": Bare("cogvideo.model.CogVideoXTransformer3DModel",
                         {"num_attention_heads": 2, "text_embed_dim": 64, "num_layers": 1, "max_text_seq_length": 40,
                          "use_rotary_positional_embeddings": True, "patch_size_t": 2}, (1, 16, 5, 32, 36), (2, 2, 2)),
    "cosmos": Bare("cosmos.model.GeneralDIT", {**COSMOS, "extra_per_block_abs_pos_emb": True,
                                               "extra_per_block_abs_pos_emb_type": "learnable",
                                               "block_x_format": "THWBD"}, VIDEO),
    "cosmos_predict2": Bare("cosmos.predict2.MiniTrainDIT", COSMOS, (1, 16, 3, 31, 33)),
    "kandinsky5": Bare("kandinsky5.model.Kandinsky5",
                       {"in_text_dim": 64, "in_text_dim2": 64, "time_dim": 64, "model_dim": 128, "ff_dim": 128,
                        "visual_embed_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1}, VIDEO,
                       conds={"y": torch.zeros(64)}),
    "chroma": Bare("chroma.model.Chroma",
                   {"in_channels": 64, "out_channels": 64, "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0,
                    "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000,
                    "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 256, "hidden_dim": 64, "n_layers": 1,
                    "txt_ids_dims": [], "vec_in_dim": 64}, (1, 16, 47, 51), conds={"guidance": torch.zeros(())}),
    "z_image": Bare("lumina.model.NextDiT",
                    {"in_channels": 16, "dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "qk_norm": True,
                     "cap_feat_dim": 64, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512],
                     "ffn_dim_multiplier": 1.0, "z_image_modulation": True, "pad_tokens_multiple": 32}, (1, 16, 47, 50),
                    conds={"num_tokens": 40}),
    "hidream": Bare("hidream.model.HiDreamImageTransformer2DModel",
                    {"patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
                     "num_attention_heads": 1, "caption_channels": [64, 64], "text_emb_dim": 64,
                     "axes_dims_rope": (64, 32, 32), "llama_layers": [0, 1]}, IMAGE,
                    conds={"y": torch.zeros(64), "encoder_hidden_states_llama3": torch.zeros(2, 30, 64)}),
    "omnigen2": Bare("omnigen.omnigen2.OmniGen2Transformer2DModel",
                     {"hidden_size": 192, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
                      "num_kv_heads": 1, "text_feat_dim": 64}, IMAGE,
                     conds={"num_tokens": 40, "ref_latents": [torch.zeros(16, 20, 30)]}),
    "auraflow": Bare("aura.mmdit.MMDiT",
                     {"in_channels": 16, "out_channels": 16, "dim": 512, "n_layers": 2, "n_double_layers": 1,
                      "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 64, "max_seq": 1024}, (1, 16, 47, 51)),
}


class Evaluation:
    """What an APPLY_MODEL wrapper is handed: calls the diffusion model."""

    def __init__(self, model):
        self.class_obj = type("BaseModel", (), {"diffusion_model": model})

    def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **conds):
        return self.class_obj.diffusion_model(x, t, context=c_crossattn, transformer_options=transformer_options,
                                              **conds)


def batched(value, batch):
    if isinstance(value, list):
        return [batched(item, batch) for item in value]
    return value.expand(batch, *value.shape).clone() if isinstance(value, torch.Tensor) else value

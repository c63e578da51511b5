"""A custom node for the server test: a seeded random text condition, for models that come without a text encoder."""
import torch


class RandomConditioning:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"length": ("INT", {"default": 48}), "width": ("INT", {"default": 64}),
                             "seed": ("INT", {"default": 0})},
                "optional": {"pooled": ("INT", {"default": 0}), "masked": ("BOOLEAN", {"default": False}),
                             # Changes nothing, but ComfyUI runs what it would take from its cache.
                             "again": ("INT", {"default": 0})}}

    def make(self, length, width, seed, pooled=0, masked=False, again=0):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, length, width, generator=generator)
        extra = {}
        if pooled:
            extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
        if masked:
            extra["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
        return ([[context, extra]],)


NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}

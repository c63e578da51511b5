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
                "optional": {"pooled": ("INT", {"default": 0})}}

    def make(self, length, width, seed, pooled=0):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, length, width, generator=generator)
        return ([[context, {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}]],)


NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}

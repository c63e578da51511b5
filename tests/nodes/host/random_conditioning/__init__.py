"""A custom node for the server test: a seeded random text condition, for models that come without a text encoder."""
import torch


class RandomConditioning:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"length": ("INT", {"default": 48}), "width": ("INT", {"default": 64}),
                             "seed": ("INT", {"default": 0})}}

    def make(self, length, width, seed):
        context = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
        return ([[context, {}]],)


NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}

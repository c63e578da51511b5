"""Custom nodes for the soak: one makes a model fail on demand, one counts what the server's process holds."""
import gc
import json
from collections import Counter

import torch
from comfy.patcher_extension import WrappersMP

SLOT = "optimized_attention_override"
COUNTED = "SpargeOverride", "RunState", "RunSummary", "CallRecord", "Tuner", "CallMeasure"


class FailingModel:
    """Fails at its `after`-th evaluation, or at the `after`-th attention call that reaches an override."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "where": (["evaluation", "attention"],), "after": ("INT",),
                             "again": ("INT",)}}

    def patch(self, model, where, after, again):
        left = after

        def failing(func, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError(f"asked to fail in this {where}")
            return func(*args, **kwargs)

        patched = model.clone()
        if where == "attention":
            patched.model_options["transformer_options"][SLOT] = failing
        else:
            patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "failing", failing)
        return (patched,)


class Census:
    """Count the tensors in the process and the objects of this pack's classes."""

    RETURN_TYPES = ()
    FUNCTION = "count"
    CATEGORY = "testing"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")

    def count(self):
        gc.collect()
        found = Counter({"tensors": 0})
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, torch.Tensor):
                found["tensors"] += 1
            elif kind.__name__ in COUNTED:
                found[kind.__name__] += 1
        return {"ui": {"census": [json.dumps(found)]}}


NODE_CLASS_MAPPINGS = {"FailingModel": FailingModel, "Census": Census}

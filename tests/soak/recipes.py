"""The prompts of a soak: a fixed set of recipes. Each recipe gives the same picture whenever it runs."""
from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..nodes.host import checkpoints

CLIPS = [{"width": 256, "height": 256, "length": 9}, {"width": 192, "height": 256, "length": 5},
         {"width": 320, "height": 192, "length": 9}]
PICTURES = [{"width": 384, "height": 384}, {"width": 320, "height": 256}, {"width": 256, "height": 448}]
LTXV_CLIPS = [{"width": 512, "height": 512, "length": 17}, {"width": 512, "height": 512, "length": 9},
              {"width": 384, "height": 512, "length": 17}]
# For each family, the node that makes its latent, and sizes of 256 to 816 tokens.
FAMILIES = {"wan": ("EmptyHunyuanLatentVideo", CLIPS), "hunyuan_video": ("EmptyHunyuanLatentVideo", CLIPS),
            "flux": ("EmptySD3LatentImage", PICTURES), "sd3.5": ("EmptySD3LatentImage", PICTURES),
            "lumina2": ("EmptySD3LatentImage", PICTURES), "ltxv": ("EmptyLTXVLatentVideo", LTXV_CLIPS)}
TUNED_FILE = "tuned.safetensors"
MIN_TOKENS = 256
# twice: a chain of two Apply nodes. tuned: Apply with loaded parameters.
KINDS = "raw", "apply", "twice", "tuned"


@dataclass(frozen=True)
class Recipe:
    """One prompt: kind, family, size and everything that its picture depends on; widgets: of each Apply node."""

    name: str
    kind: str
    family: str
    size: dict
    batch: int
    steps: int
    cfg: float
    widgets: tuple[dict, ...]
    report: bool

    @property
    def weight(self) -> float:
        """How often to draw this recipe: a search takes as long as thirty other prompts."""
        return 0.25 if self.kind == "tune" else 1.0

    def graph(self, again: int) -> dict:
        """The prompt in API format. `again`: changes no picture, but makes ComfyUI sample anew."""
        family = checkpoints.FAMILIES[self.family]
        latent, _ = FAMILIES[self.family]
        length, width = family.context
        sampling = {"seed": 7, "steps": self.steps, "cfg": self.cfg, "sampler_name": "euler", "scheduler": "simple",
                    "denoise": 1.0, "positive": ["positive", 0], "negative": ["negative", 0],
                    "latent_image": ["latent", 0]}
        text = {"length": length, "width": width, "pooled": family.pooled or 0, "masked": family.text_mask,
                "again": again}
        graph = {"loader": node("UNETLoader", unet_name=f"tiny_{self.family}.safetensors", weight_dtype="default"),
                 "positive": node("RandomConditioning", seed=1, **text),
                 "negative": node("RandomConditioning", seed=2, **text),
                 "latent": node(latent, batch_size=self.batch, **self.size)}
        params = {}
        if self.kind == "tuned":
            graph["load"] = node("SpargeAttnLoadParams", filename=TUNED_FILE, if_unusable="stop")
            params = {"params": ["load", 0]}
        elif self.kind == "tune":
            graph["tune"] = node("SpargeAttnTune", model=["loader", 0], **sampling, l1=0.1, l2=0.12, sampled_steps=1,
                                 start_percent=0.0, end_percent=1.0, evaluate=False, min_gain=0.1,
                                 min_tokens=MIN_TOKENS)
            graph["save"] = node("SpargeAttnSaveParams", params=["tune", 0], filename=TUNED_FILE, if_exists="overwrite")
            graph["picture_of_search"] = saved("tune", 1)
            params = {"params": ["tune", 0]}
        model = "loader"
        for number, widgets in enumerate(self.widgets):
            graph[f"apply{number}"] = node("ApplySpargeAttn", model=[model, 0], **widgets, **params)
            model = f"apply{number}"
        graph["sample"] = node("KSampler", model=[model, 0], **sampling)
        graph["picture"] = saved("sample", 0)
        if self.report:
            graph["report"] = node("SpargeAttnReport", model=[model, 0], samples=["sample", 0], block="", head=0,
                                   step=0, theme="dark")
        return graph


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def saved(source: str, output: int) -> dict:
    return node("SaveLatent", samples=[source, output], filename_prefix="soak")


def draw_widgets(random: Random) -> dict:
    """Values of the widgets of Apply SpargeAttn."""
    selection = random.choice([{"selection": "cdf", "selection.cdf_threshold": random.choice([0.9, 0.98])},
                               {"selection": "topk", "selection.keep_percent": random.choice([25.0, 50.0])}])
    return {**selection, "selection.similarity_threshold": random.choice([-1.0, 0.3, 0.5]),
            "pv_threshold": random.choice([10.0, 50.0]), "start_percent": random.choice([0.0, 0.0, 0.4]),
            "end_percent": random.choice([1.0, 1.0, 0.7]), "skipped_blocks": random.choice(["drop", "pooled"]),
            "pv_precision": random.choice(["auto", "fp16"]), "dense_blocks": random.choice(["", "", "0", "1, 3-4"]),
            "min_tokens": MIN_TOKENS, "verbose": random.random() < 0.2,
            "hilbert": random.choice(["auto", "on", "off"])}


def draw(random: Random, number: int) -> list[Recipe]:
    """`number` recipes: first the one that tunes, whose file others load, then all kinds and families in turn."""
    families = [*FAMILIES]
    random.shuffle(families)
    kinds = [*KINDS, *random.choices(KINDS, k=number)]
    return [_tuning(random)] + [_draw_one(random, f"recipe{i}", kinds[i], families[i % len(families)])
                                for i in range(number - 1)]


def _tuning(random: Random) -> Recipe:
    """The recipe that tunes, at 256 tokens."""
    return Recipe("tuning", "tune", "wan", {"width": 256, "height": 256, "length": 1}, batch=1, steps=2, cfg=1.0,
                  widgets=(draw_widgets(random),), report=False)


def _draw_one(random: Random, name: str, kind: str, family: str) -> Recipe:
    family = "wan" if kind == "tuned" else family
    applied = {"raw": 0, "twice": 2}.get(kind, 1)
    return Recipe(name, kind, family, random.choice(FAMILIES[family][1]), batch=2 if random.random() < 0.2 else 1,
                  steps=random.choice([1, 2]), cfg=random.choice([1.0, 1.0, 3.0]),
                  widgets=tuple(draw_widgets(random) for _ in range(applied)),
                  report=bool(applied) and random.random() < 0.3)

"""Prompts that fail, each in its own way and with a known message."""
from __future__ import annotations

from collections.abc import Callable
from random import Random

from .recipes import TUNED_FILE, Recipe, node

DAMAGED = "damaged.safetensors"


def _set(graph: dict, class_type: str, **inputs) -> None:
    for entry in graph.values():
        if entry["class_type"] == class_type:
            entry["inputs"].update(inputs)


def _bad_widget(graph: dict, recipe: Recipe, random: Random) -> str:
    name, value = random.choice([("dense_blocks", "0, x"), ("pv_threshold", 0.5), ("min_tokens", 0),
                                 ("skipped_blocks", "none"), ("start_percent", 1.5)])
    _set(graph, "ApplySpargeAttn", **{name: value})
    return name


def _unknown_file(graph: dict, recipe: Recipe, random: Random) -> str:
    _load(graph, "nowhere.safetensors")
    return "filename"


def _damaged_file(graph: dict, recipe: Recipe, random: Random) -> str:
    _load(graph, DAMAGED)
    return "can't be used as tuned parameters"


def _params_of_another_model(graph: dict, recipe: Recipe, random: Random) -> str:
    _load(graph, TUNED_FILE)
    _set(graph, "UNETLoader", unet_name="tiny_ltxv.safetensors")
    return "params must be tuned for this model"


def _load(graph: dict, name: str) -> None:
    graph["load"] = node("SpargeAttnLoadParams", filename=name, if_unusable="stop")
    _set(graph, "ApplySpargeAttn", params=["load", 0])


def _failing_model(graph: dict, recipe: Recipe, random: Random) -> str:
    return _insert_failing(graph, "evaluation", random.randrange(recipe.steps), random)


def _failing_attention(graph: dict, recipe: Recipe, random: Random) -> str:
    _set(graph, "ApplySpargeAttn", dense_blocks="0-99", min_tokens=1 << 20)  # dense calls go to the override below
    return _insert_failing(graph, "attention", random.randrange(2 * recipe.steps), random)


def _insert_failing(graph: dict, where: str, after: int, random: Random) -> str:
    graph["failing"] = node("FailingModel", model=["loader", 0], where=where, after=after,
                            again=random.randrange(1 << 30))
    for name, entry in graph.items():
        if name != "failing" and entry["inputs"].get("model") == ["loader", 0]:
            entry["inputs"]["model"] = ["failing", 0]
    return "asked to fail"


def _text_of_another_width(graph: dict, recipe: Recipe, random: Random) -> str:
    _set(graph, "RandomConditioning", width=72)
    return "shape|size"


def _nothing_to_tune(graph: dict, recipe: Recipe, random: Random) -> str:
    _set(graph, "SpargeAttnTune", min_tokens=4096)
    return "min_tokens must let"


def _name_with_a_folder(graph: dict, recipe: Recipe, random: Random) -> str:
    _set(graph, "SpargeAttnSaveParams", filename="../elsewhere")
    return "filename must be"


EVERYWHERE = _failing_model, _text_of_another_width
WITH_APPLY = _bad_widget, _unknown_file, _damaged_file, _params_of_another_model, _failing_attention
MISHAPS: dict[str, tuple[Callable, ...]] = {
    "raw": EVERYWHERE, "apply": EVERYWHERE + WITH_APPLY, "twice": EVERYWHERE + WITH_APPLY,
    "tuned": EVERYWHERE + WITH_APPLY,
    "tune": (*EVERYWHERE, _bad_widget, _failing_attention, _nothing_to_tune, _name_with_a_folder)}


def failing(recipe: Recipe, again: int, random: Random) -> tuple[dict, str, str]:
    """A failing variant of the recipe's prompt, a pattern for the message, and a description of the variant."""
    graph = recipe.graph(again)
    mishap = random.choice(MISHAPS[recipe.kind])
    return graph, mishap(graph, recipe, random), mishap.__name__.strip("_")

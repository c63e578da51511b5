"""What goes wrong while Tune runs, at every stage, and what then is left of the search, the files and the model."""
import asyncio
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from sampling import MIN_TOKENS, condition, interrupted_at, sample, widget_defaults

FAMILY = checkpoints.FAMILIES["wan"]
BOUNDS = {"l1": 0.3, "l2": 0.35}


class Injected(RuntimeError):
    pass


@pytest.fixture(scope="module")
def pack(comfy_nodes):
    """The pack's modules by name."""
    package = comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnTune"].__module__.removesuffix("nodes.tune_node")
    return SimpleNamespace(nodes=comfy_nodes.NODE_CLASS_MAPPINGS, **{
        name.rsplit(".", 1)[1]: sys.modules[package + name] for name in (
            "nodes.tuned.search", "nodes.tuned.params", "nodes.tuned.params_file", "nodes.call.arguments",
            "nodes.call.plan", "nodes.params_nodes", "nodes.tuner", "nodes.report.tuned_page")})


@pytest.fixture(autouse=True)
def few_candidates(pack, monkeypatch):
    """One selection, tail and format: the search is the same, and an eighth as long."""
    few = tuple(candidate for candidate in pack.search.CANDIDATES if candidate[:3] == ("topk", "drop", "fp16"))
    for module in (pack.search, pack.params_file):
        monkeypatch.setattr(module, "CANDIDATES", few)
    monkeypatch.setattr(pack.search, "VARIANTS", (few[0].variant,))


@pytest.fixture(scope="module")
def model(comfy_nodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    checkpoints.write(FAMILY, path)
    with pytest.MonkeyPatch.context() as patch:
        yield checkpoints.load(FAMILY, path, patch)


@pytest.fixture(autouse=True)
def no_unfinished_files(pack):
    for path in unfinished(pack):
        path.unlink()


def unfinished(pack):
    return list(pack.params_nodes.params_folder().glob("unfinished_*"))


def tune(pack, model, **widgets):
    """(params, latent, report) of a short run of Tune SpargeAttn."""
    node = pack.nodes["SpargeAttnTune"]
    values = {**widget_defaults(node), "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
              "sampled_steps": 1, "start_percent": 0.0, "min_tokens": MIN_TOKENS, "evaluate": True, **BOUNDS, **widgets}
    return node.execute(model=model, positive=condition(FAMILY), negative=condition(FAMILY, seed=2),
                        latent_image={"samples": torch.zeros(FAMILY.latent)}, **values).result


def failing(function, at, problem=Injected):
    """The function, whose call number `at` (and all later ones where it is None) fails."""
    count = 0

    def called(*args, **kwargs):
        nonlocal count
        count += 1
        if at is None or count == at:
            raise problem("injected")
        return function(*args, **kwargs)

    return called


def dense_that_fails(model, at):
    """A clone whose attention fails in call number `at`."""
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = failing(
        lambda func, *args, **kwargs: func(*args, **kwargs), at)
    return clone


@pytest.mark.parametrize("stage, at, layers", (
    ("dense", 1, 0), ("dense", 7, 1), ("dense", 8, 2), ("measure", 5, 0), ("measure", 40, 1), ("learn", 1, 0),
    ("learn", 2, 1), ("evaluate", 1, 2), ("evaluate", 2, 2)), ids=str)
def test_a_failure_keeps_what_was_found(pack, model, monkeypatch, stage, at, layers):
    """The second of two steps is searched; each of two blocks calls self-attention and cross-attention."""
    before = sample(model, FAMILY)
    with monkeypatch.context() as patch:
        if stage == "measure":
            patch.setattr(pack.tuner.CallMeasure, "__call__", failing(pack.tuner.CallMeasure.__call__, at))
        elif stage != "dense":
            patch.setattr(pack.search.LayerSearch, stage, failing(getattr(pack.search.LayerSearch, stage), at))
        with pytest.raises(Injected, match="injected"):
            tune(pack, dense_that_fails(model, at) if stage == "dense" else model)
    files = unfinished(pack)
    assert len(files) == bool(layers)
    assert [len(pack.params_file.load(path).layers) for path in files] == [layers] * len(files)
    assert torch.equal(sample(model, FAMILY), before)
    for path in files:
        assert len(tune(pack, model, evaluate=False, params=pack.params_file.load(path))[0].layers) == FAMILY.calls


def test_a_stopped_evaluation_keeps_the_whole_search(pack, model):
    with interrupted_at(0.7):
        tune(pack, model)
    kept = pack.params_file.load(*unfinished(pack))
    assert [layer.search.calls for layer in kept.layers.values()] == [1] * FAMILY.calls


@pytest.mark.parametrize("at", ("search", "file"))
def test_a_save_that_fails_does_not_hide_what_stopped_the_search(pack, model, monkeypatch, caplog, at):
    monkeypatch.setattr(pack.search.LayerSearch, "evaluate", failing(None, None))
    if at == "file":
        monkeypatch.setattr("os.fsync", failing(None, None, OSError))
    else:
        monkeypatch.setattr(pack.params_file, "_serialise", failing(None, None, TypeError))
    with pytest.raises(Injected):
        tune(pack, model)
    assert "can't be saved" in caplog.text
    assert not unfinished(pack) and not list(pack.params_nodes.params_folder().glob(".*"))


def test_a_picture_that_fails_leaves_the_search(pack, model, monkeypatch, caplog):
    monkeypatch.setattr(pack.tuned_page, "draw_tuned", failing(None, None, OSError))
    params, latent, report = tune(pack, model)
    assert len(params.layers) == FAMILY.calls and latent["samples"].isfinite().all()
    assert report.ndim == 4 and report.shape[-1] == 3
    assert sum("can't be drawn" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("problem, reason", ((torch.OutOfMemoryError, "out of memory"),
                                             ("FastPathError", "fast kernels failed")))
def test_calls_that_cannot_be_measured_are_not_tuned(pack, model, monkeypatch, caplog, problem, reason):
    """The first of the two layers; the evaluation knows nothing of it."""
    problem = getattr(pack.tuner, problem) if isinstance(problem, str) else problem
    dense = sample(model, FAMILY)
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(pack.tuner.CallMeasure, "__call__", failing(pack.tuner.CallMeasure.__call__, 7, problem))
        params, latent, _ = tune(pack, model, sampled_steps=1)
    assert len(params.layers) == FAMILY.calls - 1
    assert sum(reason in message for message in caplog.messages) == 1
    assert pack.params_file.load(pack.params_file.save(params, pack.params_nodes.params_folder(), "rest")).layers
    assert torch.equal(sample(model, FAMILY), dense)
    for owner, name in ((pack.tuner.CallMeasure, "__call__"), (pack.tuner.CallMeasure, "__init__")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=reason):
            patch.setattr(owner, name, failing(None, None, problem))
            tune(pack, model)
    assert not unfinished(pack)


def test_what_was_found_before_stays_where_calls_cannot_be_measured(pack, model, monkeypatch):
    before = tune(pack, model, evaluate=False)[0]
    monkeypatch.setattr(pack.tuner.CallMeasure, "__call__",
                        failing(pack.tuner.CallMeasure.__call__, 7, torch.OutOfMemoryError))
    after = tune(pack, model, evaluate=False, params=before)[0]
    assert [layer.search.calls for layer in after.layers.values()] == [1, 2]


def test_calls_whose_dense_result_is_not_finite_are_not_tuned(pack, model):
    broken = model.clone()
    broken.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, *args, **kwargs: func(*args, **kwargs).fill_(float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        tune(pack, broken)


def planted(pack, need, entered=None, go_on=None):
    """A measure whose heads hold the bound from the share `need` on; it tells when it is asked and waits."""
    def measure(setting):
        if entered is not None:
            entered.set()
            assert go_on.wait(30)
        amount = setting.params.amount
        return pack.search.Measured((amount < need).float(), amount)

    measure.finite = True
    return measure


def search(pack, tuner, layer, measure):
    """Let the tuner search one call of two heads."""
    q = torch.zeros(1, 2, 4, 64)
    call = pack.arguments.AttentionCall(q, q, q, "BHND")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.tuner, "CallMeasure", lambda *_: measure)
        tuner._search(layer, call, pack.plan.CallSite(layer=layer), SimpleNamespace(layout="no grid"), q)


def test_threads_build_on_each_others_results(pack):
    """Two at once on one layer, from the same beginning; a third on another layer waits for neither."""
    def tuner():
        nothing = pack.params.TunedParams(pack.params.Architecture("Model", {}), pack.search.Bounds(0.05, 0.05))
        return pack.tuner.Tuner(nothing, pack.plan.NodeSettings(None), 1)

    shared, events = tuner(), [threading.Event() for _ in range(3)]
    go_on = events[2]
    measures = [planted(pack, need, event, go_on) for need, event in zip((0.3, 0.6), events)]
    q = torch.zeros(1, 2, 4, 64)
    call, plan = pack.arguments.AttentionCall(q, q, q, "BHND"), SimpleNamespace(layout="no grid")
    threads = [threading.Thread(target=shared._learn_from, args=("a", call, plan, measure)) for measure in measures]
    for thread in threads:
        thread.start()
    assert all(event.wait(30) for event in events[:2])
    search(pack, shared, "b", planted(pack, 0.4))
    assert list(shared.tuned.layers) == ["b"]
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert shared.tuned.layers.keys() == {"a", "b"} and shared.searched == 3
    alone = tuner()
    for need in (0.3, 0.6):
        search(pack, alone, "a", planted(pack, need))
    one, two = (x.tuned.layers["a"].search for x in (shared, alone))
    assert one.calls == two.calls == 2 and torch.equal(one.levels, two.levels)
    assert torch.equal(one.setting.params.amount, two.setting.params.amount)


def prompt(**widgets):
    """Tune and Save, behind nodes that lack their inputs and complain for themselves."""
    defaults = {"seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
                "l1": 0.05, "l2": 0.05, "sampled_steps": 1, "start_percent": 0.2, "end_percent": 1.0, "evaluate": True,
                "min_gain": 0.1, "min_tokens": 2048, "filename": "tuned", "if_exists": "overwrite", **widgets}
    save = {name: defaults.pop(name) for name in ("filename", "if_exists")}
    links = {"model": ["loader", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    return {"loader": {"class_type": "UNETLoader", "inputs": {}},
            "text": {"class_type": "ConditioningZeroOut", "inputs": {}},
            "latent": {"class_type": "EmptyLatentImage", "inputs": {}},
            "tune": {"class_type": "SpargeAttnTune", "inputs": {**links, **defaults}},
            "save": {"class_type": "SpargeAttnSaveParams", "inputs": {"params": ["tune", 0], **save}}}


@pytest.mark.parametrize("widgets, wrong", (
    ({}, set()), ({"min_tokens": 0}, set()), ({"min_tokens": 1}, set()), ({"l1": 0.06}, set()),
    ({"start_percent": 0.5, "end_percent": 0.5}, set()),
    ({"start_percent": ["loader", 0]}, {("tune", "start_percent")}),
    ({"start_percent": 0.6, "end_percent": 0.5}, {("tune", "start_percent"), ("tune", "end_percent")}),
    ({"end_percent": float("nan")}, {("tune", "start_percent"), ("tune", "end_percent")}),
    ({"l1": 0.9}, {("tune", "l1")}), ({"min_tokens": -1}, {("tune", "min_tokens")}),
    ({"filename": "CON"}, {("save", "filename")}), ({"filename": ""}, {("save", "filename")}),
    ({"filename": "日" * 100}, {("save", "filename")}), ({"filename": "../x"}, {("save", "filename")}),
    ({"filename": "x", "if_exists": "ask"}, {("save", "if_exists")})))
def test_mistakes_are_shown_where_they_are_before_anything_runs(comfy_nodes, widgets, wrong):
    import execution

    _, _, _, errors = asyncio.run(execution.validate_prompt("0", prompt(**widgets), None))
    shown = [(node, error["extra_info"]["input_name"]) for node in ("tune", "save")
             for error in errors.get(node, {"errors": ()})["errors"]]
    assert sorted(shown) == sorted(wrong), errors


@pytest.mark.parametrize("name, told", ((None, "save one with Save SpargeAttn Params or put one there"),
                                        ("gone.safetensors", "must be a file in models/sparge_params")))
def test_load_without_a_file_says_what_to_do(pack, monkeypatch, name, told):
    """One error at the widget; with an empty folder the list has an entry that says so."""
    import execution

    monkeypatch.setattr(pack.params_nodes, "_files", list)
    widget = pack.nodes["SpargeAttnLoadParams"].define_schema().inputs[0]
    inputs = {"filename": name or widget.options[0], "if_unusable": "run untuned"}
    prompt = {"load": {"class_type": "SpargeAttnLoadParams", "inputs": inputs}}
    valid, errors, _ = asyncio.run(execution.validate_inputs("0", prompt, "load", {}))
    [error] = errors
    assert not valid and error["extra_info"]["input_name"] == "filename" and told in error["details"]


def test_min_tokens_can_hold_powers_of_two_in_the_editor(pack):
    """The editor rounds to a multiple of the step from the smallest value on."""
    widget = next(x for x in pack.nodes["SpargeAttnTune"].define_schema().inputs if x.id == "min_tokens")
    assert all((value - widget.min) % widget.step == 0 for value in (512, 1024, 2048, 4096, widget.default))


def test_hostile_files_in_the_load_node(pack, model):
    """Truncated, with flipped bits, and empty; refused or ignored as asked, or loaded as parameters."""
    load, folder = pack.nodes["SpargeAttnLoadParams"].execute, Path(pack.params_nodes.params_folder())
    data = pack.params_file.save(tune(pack, model, evaluate=False)[0], folder, "hostile").read_bytes()
    refused = 0
    for seed in range(40):
        rng, bad = random.Random(seed), bytearray(data)
        for _ in range(1 + seed % 3):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (folder / "hostile.safetensors").write_bytes(bad[:rng.randrange(len(bad))] if seed % 2 else bad)
        params = load(filename="hostile.safetensors", if_unusable="run untuned").result[0]
        if params is None:
            refused += 1
            with pytest.raises(ValueError, match="hostile.safetensors can't be used"):
                load(filename="hostile.safetensors", if_unusable="stop")
        else:
            assert 0 <= params.sparsity <= 1 and params.layers.keys()
    assert 20 <= refused < 40, refused

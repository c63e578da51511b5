"""Tune, save, load and apply in a real ComfyUI: on the demo's trained model, and on random models of other families."""
import re
from dataclasses import replace
from pathlib import Path

import checkpoints
import comfy_host
import pytest
import torch
from sampling import MIN_TOKENS, apply, condition, interrupted_at, widget_defaults

CHECKPOINT = comfy_host.REPOSITORY / "nodes/demo/wan_shapes.safetensors"
GRID = 4, 8, 16  # tokens: 512, in 4 × 8 blocks
LAYERS, HEADS = [f"double:{i}" for i in range(6)], 2
BOUNDS = {"l1": 0.1, "l2": 0.12}


def node(comfy_nodes, name):
    return comfy_nodes.NODE_CLASS_MAPPINGS[name]


def tune(comfy_nodes, model, positive, shape, **widgets):
    """(params, latent, report) of a run of Tune SpargeAttn: defaults, but short. shape: or a latent of its own kind."""
    tuner = node(comfy_nodes, "SpargeAttnTune")
    values = {**widget_defaults(tuner), "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
              "sampled_steps": 1, "start_percent": 0.0, "min_tokens": MIN_TOKENS, "evaluate": False, **BOUNDS,
              **widgets}
    latent = {"samples": torch.zeros(shape) if isinstance(shape, tuple) else shape}
    return tuner.execute(model=model, positive=positive, negative=positive, latent_image=latent, **values).result


def folder():
    import folder_paths

    return Path(folder_paths.get_folder_paths("sparge_params")[0])


def save(comfy_nodes, params, name, if_exists="add a number"):
    """File name under which Save SpargeAttn Params reports to have saved."""
    out = node(comfy_nodes, "SpargeAttnSaveParams").execute(params=params, filename=name, if_exists=if_exists)
    return out.ui["text"][0].split(":")[0]


def load(comfy_nodes, name, if_unusable="stop"):
    return node(comfy_nodes, "SpargeAttnLoadParams").execute(filename=name, if_unusable=if_unusable).result[0]


@pytest.fixture(scope="module")
def model(comfy_nodes):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(CHECKPOINT))


@pytest.fixture(scope="module")
def words(comfy_nodes):
    from comfyui_spargeattn.nodes.demo import words

    return words


@pytest.fixture(scope="module")
def positive(words):
    return [[words.encode(words.prompt("star red stripes right", "blue checker left")[None]), {}]]


@pytest.fixture(scope="module")
def other(words):
    return [[words.encode(words.prompt("ring yellow plain left", "green plain up")[None]), {}]]


SHAPE = (1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])


def sample(model, positive, seed=5, steps=4):
    import comfy.sample

    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", positive, positive, torch.zeros(SHAPE),
                               seed=seed, disable_pbar=True)


@pytest.fixture(scope="module")
def watched(comfy_nodes, model, positive, other):
    """A search with evaluation, and what it showed meanwhile: (value, total, preview) of the bar, lines on the node."""
    import comfy.utils

    seen, lines = [], []
    comfy.utils.set_progress_bar_global_hook(lambda *what, node_id=None: seen.append(what))
    try:
        with pytest.MonkeyPatch.context() as patch:
            tune_node, line = (comfy_host.pack_module(comfy_nodes, name)
                               for name in ("nodes.tune_node", "nodes.report.line"))
            patch.setattr(line, "INTERVAL", 0)
            patch.setattr(tune_node, "line_on_running_node", lambda: lines.append)
            return tune(comfy_nodes, model, positive, SHAPE, evaluate=True, other_positive=other), seen, lines
    finally:
        comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture(scope="module")
def tuned(watched):
    return watched[0]


def test_every_head_gets_a_sparsity_within_the_bounds(tuned):
    params = tuned[0]
    assert list(params.layers) == LAYERS
    assert all((layer.search.heads, layer.head_dim) == (HEADS, 128) for layer in params.layers.values())
    assert all((layer.search.error <= BOUNDS["l2"]).all() for layer in params.layers.values())
    assert 0.05 < params.sparsity < 1
    assert all(layer.tokens == ("512: 4×8×16",) for layer in params.layers.values())


def test_errors_on_another_prompt_and_seed_are_reported(tuned):
    params = tuned[0]
    assert all(layer.search.unseen_calls == 1 for layer in params.layers.values() if layer.search.setting)
    assert params.unseen_error[0] != params.error[0]
    assert 0 < params.unseen_error[0] < 2 * BOUNDS["l2"]
    assert "with another seed" in str(params)


def test_the_latent_is_that_of_dense_attention(tuned, model, positive):
    assert torch.equal(tuned[1]["samples"], _ksampler(model, positive))


def _ksampler(model, positive):
    import nodes

    return nodes.common_ksampler(model, 0, 4, 1.0, "euler", "simple", positive, positive,
                                 {"samples": torch.zeros(SHAPE)})[0]["samples"]


@pytest.mark.parametrize("layout", ("BHND", "BNHD"))
def test_the_error_is_that_of_the_definition(comfy_nodes, tuned, layout):
    """Σ|O − O'| / Σ|O| of each head, the larger one of a batch of two; the dense result is left as it was."""
    measure, arguments, kernels = (comfy_host.pack_module(comfy_nodes, name)
                                   for name in ("nodes.call.measure", "nodes.call.arguments", "kernels"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, 512, 128, generator=generator) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    given = [x if layout == "BHND" else x.transpose(1, 2) for x in (q, k, v)]
    shown = dense.clone() if layout == "BHND" else dense.transpose(1, 2).flatten(2)
    before = shown.clone()
    layer = tuned[0].layers["double:0"]
    setting = replace(layer.search.setting, curves=("row-major",) * HEADS)
    measured = measure.CallMeasure(arguments.AttentionCall(*given, layout), "no grid", shown)(setting)
    assert torch.equal(shown, before)
    out = kernels.sparge_attention(q, k, v, params=setting.params, skipped=setting.skipped, pv_dtype=setting.pv_dtype)
    expected = ((out - dense).abs().sum((2, 3)) / dense.abs().sum((2, 3))).amax(0)
    assert torch.allclose(measured.error, expected, rtol=1e-4)
    hilbert = replace(setting, curves=("hilbert",) * HEADS)
    assert measure.CallMeasure(arguments.AttentionCall(*given, layout), "no grid", shown)(hilbert) is None


def test_the_report_is_a_picture(tuned):
    report = tuned[2]
    assert report.ndim == 4 and report.shape[-1] == 3 and report.dtype == torch.float32
    assert 0 <= report.min() < 0.3 and report.max() <= 1


def test_saved_and_loaded_parameters_give_the_same_clip(comfy_nodes, tuned, model, positive, caplog):
    name = save(comfy_nodes, tuned[0], "demo")
    loaded = load(comfy_nodes, name)
    expected = sample(apply(comfy_nodes, model, params=tuned[0]), positive)
    with caplog.at_level("INFO"):
        assert torch.equal(sample(apply(comfy_nodes, model, params=loaded), positive), expected)
    calls = int(re.search(r"(\d+) attention calls sparse", caplog.text)[1])
    sparse = sum(layer.search.setting is not None for layer in loaded.layers.values())
    assert calls == 4 * sparse
    untuned = sample(apply(comfy_nodes, model), positive)
    assert not torch.equal(untuned, expected)


def test_tuned_clip_is_close_to_dense(comfy_nodes, clips, tuned, model, positive):
    dense = sample(model, positive)
    found = sample(apply(comfy_nodes, model, params=tuned[0]), positive)
    before, after = (clips.preview(model.model.process_latent_in(x)) for x in (dense, found))
    assert -10 * torch.log10((before - after).square().mean()) > 20


def test_layers_without_parameters_use_the_widgets(comfy_nodes, tuned, model, positive, caplog):
    layers = {name: layer for name, layer in tuned[0].layers.items() if name != "double:2"}
    with caplog.at_level("INFO"):
        sample(apply(comfy_nodes, model, params=replace(tuned[0], layers=layers)), positive)
    lines = [line for line in caplog.messages if "nothing was tuned for layer double:2" in line]
    assert len(lines) == 1 and "widgets" in lines[0]


def test_dense_layers_stay_dense(comfy_nodes, tuned, model, positive, caplog):
    params = tuned[0]
    layer = params.layers["double:1"]
    dense = replace(layer, search=replace(layer.search, setting=None))
    with caplog.at_level("INFO"):
        sample(apply(comfy_nodes, model, params=params.with_layer("double:1", dense)), positive)
    assert "4 tuned to stay dense" in caplog.text


def test_going_on_with_another_prompt_makes_it_hold_for_both(comfy_nodes, tuned, model, other):
    before = tuned[0]
    after = tune(comfy_nodes, model, other, SHAPE, params=before, seed=3)[0]
    for name, layer in after.layers.items():
        search, earlier = layer.search, before.layers[name].search
        assert search.calls == 2 and earlier.calls == 1
        assert (search.levels >= earlier.levels).all()
        assert (search.error <= BOUNDS["l2"]).all()
    assert after.sparsity <= before.sparsity + 0.05


def test_going_on_from_a_file_is_going_on(comfy_nodes, tuned, model, other):
    loaded = load(comfy_nodes, save(comfy_nodes, tuned[0], "resume"))
    one, two = (tune(comfy_nodes, model, other, SHAPE, params=params, seed=3)[0] for params in (loaded, tuned[0]))
    for name in one.layers:
        a, b = one.layers[name].search, two.layers[name].search
        assert torch.equal(a.levels, b.levels) and torch.equal(a.kept, b.kept) and torch.equal(a.error, b.error)


def test_going_on_needs_the_same_bounds_and_model(comfy_nodes, tuned, model, other):
    with pytest.raises(ValueError, match="must be those of params"):
        tune(comfy_nodes, model, other, SHAPE, params=tuned[0], l1=0.03)
    foreign = replace(tuned[0], architecture=replace(tuned[0].architecture, family="Flux"))
    with pytest.raises(ValueError, match="tuned for Flux"):
        tune(comfy_nodes, model, other, SHAPE, params=foreign)


def test_a_stopped_search_keeps_what_it_found(comfy_nodes, model, positive, tuned):
    with interrupted_at(0.6):
        tune(comfy_nodes, model, positive, SHAPE)
    kept = load(comfy_nodes, max(folder().glob("unfinished_*"), key=lambda path: path.stat().st_mtime_ns).name)
    calls = [layer.search.calls for layer in kept.layers.values()]
    assert 1 <= len(calls) < len(LAYERS) and set(calls) == {1}
    assert len(tune(comfy_nodes, model, positive, SHAPE, params=kept)[0].layers) == len(LAYERS)


def test_progress_shows_pictures_of_what_was_found(watched):
    values = [value / total for value, total, _ in watched[1]]
    assert values == sorted(values) and values[-1] == 1
    pictures = [preview for _, _, preview in watched[1] if preview]
    assert len(pictures) == 2 * len(LAYERS)
    assert all(kind == "JPEG" and image.width > 100 for kind, image, _ in pictures)


def test_node_shows_the_time_left_and_then_the_result(watched):
    (params, *_), _, lines = watched
    searching, measuring = ([int(share) for line in lines
                             for share in re.findall(rf"^{doing}: (\d+)%, about \d+ (?:s|min) left$", line)]
                            for doing in ("searching", "measuring the error with another seed"))
    for shares in (searching, measuring):
        assert shares == sorted(shares) and len(shares) >= len(LAYERS)
    assert searching[-1] <= 50 <= measuring[0]
    assert lines[-1] == f"tuned: {params.sparsity:.1%} of the attention can be skipped"


def test_a_model_with_apply_before_it_is_refused(comfy_nodes, model, positive):
    with pytest.raises(ValueError, match="without Apply SpargeAttn"):
        tune(comfy_nodes, apply(comfy_nodes, model), positive, SHAPE)


def test_a_model_whose_calls_are_all_short_is_refused(comfy_nodes, model, positive):
    with pytest.raises(ValueError, match="min_tokens"):
        tune(comfy_nodes, model, positive, SHAPE, min_tokens=100_000)


def test_nothing_is_overwritten_unless_asked(comfy_nodes, tuned):
    names = [save(comfy_nodes, tuned[0], "twice") for _ in range(2)]
    assert names == ["twice.safetensors", "twice_2.safetensors"]
    before = (folder() / names[0]).stat().st_ino
    assert save(comfy_nodes, tuned[0], "twice", "overwrite") == names[0]
    assert (folder() / names[0]).stat().st_ino != before


def test_saved_files_show_up_in_the_combo(comfy_nodes, tuned):
    name = save(comfy_nodes, tuned[0], "listed")
    schema = node(comfy_nodes, "SpargeAttnLoadParams").define_schema()
    assert name in next(entry for entry in schema.inputs if entry.id == "filename").options


@pytest.mark.parametrize("name", ("../twice", "/etc/passwd", "a/b", "", "..", ".hidden", "a\0b", "x" * 200))
def test_names_that_lead_elsewhere_are_refused(comfy_nodes, tuned, name):
    with pytest.raises(ValueError, match="filename"):
        save(comfy_nodes, tuned[0], name)


@pytest.mark.parametrize("name", ("../../secret.safetensors", "/etc/passwd", "nothing.safetensors",
                                  "..\\secret.safetensors"))
def test_paths_that_lead_elsewhere_are_not_read(comfy_nodes, name):
    (folder().parent.parent / "secret.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="filename"):
        load(comfy_nodes, name)


def test_a_damaged_file_stops_the_run_or_is_ignored_as_asked(comfy_nodes, tuned, model, positive):
    name = save(comfy_nodes, tuned[0], "damaged")
    path = folder() / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(comfy_nodes, name)
    assert load(comfy_nodes, name, "run untuned") is None
    untuned = sample(apply(comfy_nodes, model), positive, steps=2)
    assert torch.equal(sample(apply(comfy_nodes, model, params=None), positive, steps=2), untuned)


def test_parameters_of_another_model_stop_the_run_or_are_ignored_as_asked(comfy_nodes, tuned, model):
    architecture = tuned[0].architecture
    foreign = replace(tuned[0], architecture=replace(architecture, config={**architecture.config, "num_layers": 40}))
    with pytest.raises(ValueError, match="num_layers 40"):
        apply(comfy_nodes, model, params=foreign)
    patched = apply(comfy_nodes, model, params=replace(foreign, lenient=True))
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    assert override.settings.tuned is None


def test_a_wrong_number_of_heads_is_an_error(comfy_nodes, tuned, model, positive):
    params = tuned[0].with_layer("double:0", replace(tuned[0].layers["double:0"], head_dim=64))
    with pytest.raises(ValueError, match="layer double:0 was tuned for 2 heads of q, 2 of k and head_dim 64"):
        sample(apply(comfy_nodes, model, params=params), positive)
    sample(apply(comfy_nodes, model, params=replace(params, lenient=True)), positive, steps=1)


@pytest.mark.parametrize("name", ("minimax_h3", "ltx2", "flux", "lumina2", "mochi"))
def test_other_families(comfy_nodes, tmp_path, monkeypatch, name):
    """Text, several kinds of blocks, shared heads of K, blocks without numbers."""
    family = checkpoints.FAMILIES[name]
    path = tmp_path / "model.safetensors"
    checkpoints.write(family, path)
    model = checkpoints.load(family, path, monkeypatch)
    latent = family.latents(torch.zeros(family.latent)) if family.audio else family.latent
    params = tune(comfy_nodes, model, condition(family), latent, steps=1, l1=0.3, l2=0.35)[0]
    assert len(params.layers) == family.calls
    loaded = load(comfy_nodes, save(comfy_nodes, params, name))
    assert loaded.sparsity == pytest.approx(params.sparsity) and loaded.sparsity > 0
    from sampling import sample as sample_family

    patched = apply(comfy_nodes, model, params=loaded)
    out = sample_family(patched, family, steps=1)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    summary = override.run.summary
    sparse = sum(layer.search.setting is not None for layer in loaded.layers.values())
    assert out.isfinite().all() and summary.sparse == sparse > 0
    assert summary.sparsity == pytest.approx(
        torch.stack([layer.search.sparsity.mean() for layer in loaded.layers.values()
                     if layer.search.setting is not None]).mean().item(), abs=0.15)

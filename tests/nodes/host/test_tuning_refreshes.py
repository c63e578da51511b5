"""Tuning for runs with refreshes in a real ComfyUI, and what Apply SpargeAttn makes of such parameters."""
from dataclasses import replace
from types import SimpleNamespace

import comfy_host
import pytest
import torch
from sampling import MIN_TOKENS, apply, widget_defaults
from test_tuning import CHECKPOINT, GRID, LAYERS, SHAPE, load, node, sample, save

STEPS, REFRESHES, BOUND = 16, 4, 0.1
TUNED, OTHER = ("star red stripes right", "blue checker left"), ("ring yellow plain left", "green plain up")
FEW = {"selection": "topk", "keep_percent": 30.0, "similarity_threshold": -1.0}


@pytest.fixture(scope="module", autouse=True)
def few_candidates(comfy_nodes):
    """One selection, tail and format: the search is the same, and an eighth as long."""
    search, params_file = (comfy_host.pack_module(comfy_nodes, f"nodes.tuned.{x}") for x in ("search", "params_file"))
    few = tuple(candidate for candidate in search.CANDIDATES if candidate[:3] == ("cdf", "pooled", "fp16"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (search, params_file):
            patch.setattr(module, "CANDIDATES", few)
        patch.setattr(search, "VARIANTS", (few[0].variant,))
        yield


@pytest.fixture(scope="module")
def model(comfy_nodes):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(CHECKPOINT))


def condition(comfy_nodes, prompt):
    words = comfy_host.pack_module(comfy_nodes, "nodes.demo.words")
    return [[words.encode(words.prompt(*prompt)[None]), {}]]


@pytest.fixture(scope="module")
def positive(comfy_nodes):
    return condition(comfy_nodes, TUNED)


def tune(comfy_nodes, model, positive, refreshes=REFRESHES, **widgets):
    """(params, latent, noise levels of the calls searched or measured)"""
    module = comfy_host.pack_module(comfy_nodes, "nodes.tuner")
    levels, look = [], module.Tuner._learn_from

    def learn_from(self, name, call, *rest):
        levels.append(call.transformer_options["sigmas"].flatten()[0].item())
        return look(self, name, call, *rest)

    tuner = node(comfy_nodes, "SpargeAttnTune")
    values = {**widget_defaults(tuner), "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
              "sampled_steps": 2, "start_percent": 0.0, "min_tokens": MIN_TOKENS, "evaluate": False, "l1": BOUND,
              "l2": BOUND, "refreshes": refreshes, **widgets}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Tuner, "_learn_from", learn_from)
        params, latent, _ = tuner.execute(model=model, positive=positive, negative=positive,
                                          latent_image={"samples": torch.zeros(SHAPE)}, **values).result
    return params, latent["samples"], levels


@pytest.fixture(scope="module")
def plain(comfy_nodes, model, positive):
    return tune(comfy_nodes, model, positive, refreshes=0)


@pytest.fixture(scope="module")
def refreshed(comfy_nodes, model, positive):
    return tune(comfy_nodes, model, positive)


class Run:
    """A run of Apply SpargeAttn with parameters, and of dense attention beside it."""

    def __init__(self, comfy_nodes, model, positive, steps=STEPS, change=lambda override: None, **widgets):
        patched = apply(comfy_nodes, model, **widgets)
        self.override = patched.model_options["transformer_options"]["optimized_attention_override"]
        change(self.override)
        self.latent, self.summary = sample(patched, positive, steps=steps), self.override.run.summary
        self.report = comfy_host.pack_module(comfy_nodes, "nodes.report.panels").run_report(
            self.summary, self.override.settings).text()

    @property
    def computed(self):
        """Share of block pairs over the whole run, dense calls counted as 1."""
        return sum(1 if share is None else 1 - share for share in self.summary.cells.values()) / len(self.summary.cells)


def schedule(model, steps=STEPS):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)[:-1].tolist()


def refreshed_levels(comfy_nodes, model, refreshes=REFRESHES):
    """Noise levels of the refreshes of a run, and how far residuals of each are extrapolated."""
    module, levels = comfy_host.pack_module(comfy_nodes, "nodes.run.refresh_schedule"), schedule(model)
    chosen = module.refresh_steps([*levels, 0.0], refreshes)
    return {levels[i]: lead for i, lead in zip(chosen, module.leads([*levels, 0.0], chosen))}


def test_more_is_skipped_at_the_same_error(plain, refreshed):
    before, after = plain[0], refreshed[0]
    assert (before.refreshes, after.refreshes) == (0, REFRESHES)
    assert list(after.layers) == LAYERS and all(layer.search.calls == 2 for layer in after.layers.values())
    assert all((layer.search.error <= BOUND).all() for layer in after.layers.values())
    assert after.sparsity > before.sparsity + 0.15
    assert f"between {REFRESHES} refreshes" in str(after) and "refreshes" not in str(before)


def test_the_latent_is_that_of_dense_attention(plain, refreshed):
    assert torch.equal(plain[1], refreshed[1])


def test_steps_between_refreshes_are_searched(comfy_nodes, model, refreshed):
    searched, due = sorted(set(refreshed[2]), reverse=True), refreshed_levels(comfy_nodes, model)
    assert len(searched) == 2 and not set(searched) & set(due)
    assert len(refreshed[2]) == 2 * len(LAYERS)


def test_residuals_of_the_search_are_extrapolated_as_those_of_runs(comfy_nodes, model, positive):
    module, made = comfy_host.pack_module(comfy_nodes, "nodes.tuner"), []

    def look(self, name, call, plan, measure):
        made.append((call.transformer_options["sigmas"].flatten()[0].item(), measure._refreshed))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no attention call"):
        patch.setattr(module.Tuner, "_learn_from", look)
        tune(comfy_nodes, model, positive, refreshes=6, sampled_steps=STEPS)
    due, led = refreshed_levels(comfy_nodes, model, 6), 0
    assert len(made) == (STEPS - 6) * len(LAYERS)
    for level, found in made:
        lead = due[min(at for at in due if at > level)]
        assert found.lead == lead and (found.earlier is not None) == (lead != 0)
        led += lead != 0
        if found.earlier:
            assert found.earlier.call.q.shape == found.call.q.shape
            assert not torch.equal(found.earlier.call.q, found.call.q)
    assert 0 < led < len(made)


def test_errors_on_another_seed_are_measured_between_refreshes_too(comfy_nodes, model, refreshed):
    other = condition(comfy_nodes, OTHER)
    params, _, levels = tune(comfy_nodes, model, other, params=refreshed[0], evaluate=True, seed=3)
    assert params.refreshes == REFRESHES and all(layer.search.calls == 4 for layer in params.layers.values())
    sparse = [layer.search for layer in params.layers.values() if layer.search.setting]
    assert sparse and all(search.unseen_calls == 2 for search in sparse)
    assert 0 < params.unseen_error[0] < 2 * BOUND
    assert not set(levels) & set(refreshed_levels(comfy_nodes, model))


def test_where_memory_is_short_layers_take_turns(comfy_nodes, model, positive, caplog):
    """Room for three of six layers: at one searched step between each two refreshes, half of them are reached."""
    module, made = comfy_host.pack_module(comfy_nodes, "nodes.tuner"), []
    share = comfy_host.pack_module(comfy_nodes, "nodes.run.refreshed_calls").SHARE
    layer = 4 * 4 * torch.Size(GRID).numel() * 256
    begin = module.Tuner.__init__
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(module, "shared_memory", lambda: SimpleNamespace(free=lambda device: int(3.5 * layer / share)))
        patch.setattr(module.Tuner, "__init__", lambda self, *args: (made.append(self), begin(self, *args))[1])
        params = tune(comfy_nodes, model, positive)[0]
    assert list(params.layers) == LAYERS
    assert all(layer.search.calls == 1 for layer in params.layers.values())
    assert sum("take turns" in line for line in caplog.messages) == 1
    assert not made[0]._refreshed._kept  # the search has ended


def test_a_sampling_without_refreshes_is_refused(comfy_nodes, model, positive):
    with pytest.raises(ValueError, match="refreshes must be 0 in this sampling, because 4 steps may go sparse.*got 4"):
        tune(comfy_nodes, model, positive, steps=4)


def test_going_on_needs_the_same_refreshes(comfy_nodes, model, positive, refreshed):
    with pytest.raises(ValueError, match="refreshes must be those of params, 4; got 0"):
        tune(comfy_nodes, model, positive, refreshes=0, params=refreshed[0])


def test_a_file_brings_its_refreshes(comfy_nodes, model, positive, refreshed, caplog):
    loaded = load(comfy_nodes, save(comfy_nodes, refreshed[0], "refreshed"))
    assert loaded.refreshes == REFRESHES
    with caplog.at_level("INFO"):
        run = Run(comfy_nodes, model, positive, params=loaded)
    assert f"refreshes {REFRESHES}, which params were tuned for" in caplog.text
    assert run.override.settings.refreshes == REFRESHES and not run.summary.untuned
    assert run.summary.dense["refresh of the residuals"] == REFRESHES * len(LAYERS)
    assert f"between {REFRESHES} refreshes" in run.report and f"refreshes {REFRESHES}; residuals" in run.report
    same = Run(comfy_nodes, model, positive, params=refreshed[0], refreshes=REFRESHES)
    assert torch.equal(run.latent, same.latent)


def test_a_clip_is_closer_to_dense_for_less_work(comfy_nodes, clips, model, positive, plain, refreshed):
    def psnr(run):
        shown = (clips.preview(model.model.process_latent_in(x)) for x in (run.latent, dense))
        return -10 * torch.log10((next(shown) - next(shown)).square().mean()).item()

    dense = sample(model, positive, steps=STEPS)
    before, after = (Run(comfy_nodes, model, positive, params=params[0]) for params in (plain, refreshed))
    found = SimpleNamespace(db=(psnr(before), psnr(after)), computed=(before.computed, after.computed))
    assert found.db[1] > found.db[0] + 3 and found.computed[1] < found.computed[0], found


@pytest.mark.parametrize("why", ("few steps", "no memory"))
def test_calls_without_a_residual_use_the_widgets(comfy_nodes, model, positive, refreshed, caplog, why):
    def no_memory(override):
        room = override.run.residuals.room
        room._memory = replace(room._memory, free=lambda device: 0)

    steps, change = (4, lambda override: None) if why == "few steps" else (STEPS, no_memory)
    with caplog.at_level("INFO"):
        run = Run(comfy_nodes, model, positive, steps, change, params=refreshed[0], selection=FEW)
    reason = "they were tuned for refreshes, and this call has no residual"
    sparse = sum(layer.search.setting is not None for layer in refreshed[0].layers.values())
    calls = run.summary.untuned[reason]
    assert calls == run.summary.sparse and calls % sparse == 0 and calls > 0
    assert sum(f"thresholds of the widgets: {reason}" in line for line in caplog.messages) == 1
    assert f"{calls} calls used the widgets in place of params: {reason}" in run.report
    if why == "few steps" and sparse == len(LAYERS):
        assert torch.equal(run.latent, Run(comfy_nodes, model, positive, steps, selection=FEW,
                                                 refreshes=REFRESHES).latent)


@pytest.mark.parametrize("tuned_for, chosen, says", (
    (0, 2, "params were tuned without refreshes"), (4, 5, "params were tuned for 4 refreshes, the node has 5"),
    (4, 3, "further from"), (4, 4, ""), (0, 0, "")))
def test_other_refreshes_than_tuned_for_are_said(comfy_nodes, model, plain, refreshed, caplog, tuned_for, chosen, says):
    params = refreshed[0] if tuned_for else plain[0]
    with caplog.at_level("INFO"):
        patched = apply(comfy_nodes, model, params=params, refreshes=chosen)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    assert override.settings.refreshes == chosen
    assert says in caplog.text if says else "were tuned" not in caplog.text


def test_files_of_releases_load(comfy_nodes, plain):
    """Without refreshes nothing in a file has changed."""
    params_file = comfy_host.pack_module(comfy_nodes, "nodes.tuned.params_file")
    assert b"refreshes" not in params_file._serialise(plain[0])
    assert load(comfy_nodes, save(comfy_nodes, plain[0], "plain")).refreshes == 0

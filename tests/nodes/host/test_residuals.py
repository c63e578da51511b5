"""Refreshes in a real sampling run: which calls are dense, which get a residual, and of what."""
import logging
from dataclasses import replace
from unittest import mock

import checkpoints
import comfy_host
import pytest
import torch
from sampling import SPARSE, apply, probed, sample

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

FAMILY = replace(checkpoints.FAMILIES["wan"], latent=(1, 16, 2, 32, 32))  # 512 tokens
STEPS = 8


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(FAMILY, tmp_path_factory.mktemp("checkpoints"))


def kernel_calls(comfy_nodes):
    """The module that calls the kernels, as ComfyUI has imported it."""
    return comfy_host.pack_module(comfy_nodes, "nodes.run.kernel_calls")


class Run:
    """A run with refreshes.

    dense: noise levels of the self-attention calls that stayed dense.
    sparse: (batch, residual or None) of those that went sparse.
    """

    def __init__(self, comfy_nodes, model, refreshes=3, family=FAMILY, sampling=None, change=lambda patched: None,
                 **widgets):
        below, probe = probed(model)
        self.patched = apply(comfy_nodes, below, selection=SPARSE, refreshes=refreshes, **widgets)
        self.override = self.patched.model_options["transformer_options"]["optimized_attention_override"]
        change(self.patched)
        module, self.sparse = kernel_calls(comfy_nodes), []
        attention = module.sparge_attention

        def record(q, *rest, residual=None, **call):
            self.sparse.append((q.shape[0], residual))
            return attention(q, *rest, residual=residual, **call)

        with mock.patch.object(module, "sparge_attention", record):
            self.latent = sample(self.patched, family, **{"steps": STEPS, **(sampling or {})})
        self.summary, self.dense = self.override.run.summary, probe.declined

    @property
    def without(self):
        """How many sparse calls got no residual."""
        return sum(residual is None for _, residual in self.sparse)


def schedule(model, steps=STEPS):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)[:-1].tolist()


def test_between_refreshes_every_sparse_call_gets_one(comfy_nodes, wan):
    run = Run(comfy_nodes, wan)
    levels = sorted(set(run.dense), reverse=True)
    assert len(levels) == 3 and levels[0] == schedule(wan)[0]
    assert len(run.dense) == 3 * FAMILY.calls
    assert len(run.sparse) == (STEPS - 3) * FAMILY.calls and run.without == 0
    assert run.summary.dense["refresh of the residuals"] == len(run.dense)
    assert f"added to {len(run.sparse)} sparse calls" in run.summary.residuals


def test_the_last_dense_step_is_a_refresh(comfy_nodes, wan):
    steps, start = 12, wan.get_model_object("model_sampling").percent_to_sigma(0.3)
    run = Run(comfy_nodes, wan, refreshes=2, start_percent=0.3, sampling={"steps": steps})
    outside = [level for level in schedule(wan, steps) if level > start]
    assert 0 < len(outside) and run.without == 0
    assert len(set(run.dense)) == len(outside) + 2
    assert run.summary.dense["refresh of the residuals"] == 2 * FAMILY.calls


def with_free(size):
    """So many bytes are free for residuals; returns what ComfyUI is asked to make room for."""
    asked = []

    def change(patched):
        room = patched.model_options["transformer_options"]["optimized_attention_override"].run.residuals.room
        room._memory = replace(room._memory, free=lambda device: size, make_room=lambda *what: asked.append(what))

    return change, asked


def test_no_memory(comfy_nodes, wan):
    """No evaluation comes before the first refresh, to count what is needed."""
    run = Run(comfy_nodes, wan, change=with_free(0)[0])
    assert run.without == len(run.sparse) > 0
    assert f"no memory for {3 * FAMILY.calls}" in run.summary.residuals


def test_memory_is_counted_before(comfy_nodes, wan, caplog):
    """For two conditions in one batch: with a byte too little there is no refresh, and ComfyUI is asked for room."""
    needed, found = 2 * 2 * FAMILY.calls * 2 * 512 * (128 + 4), []
    late = dict(start_percent=0.3, sampling={"steps": 12, "cfg": 3.0})
    for free, refreshes in ((needed, 4), (needed - 2, 0)):
        change, asked = with_free(free)
        with caplog.at_level(logging.INFO):
            run = Run(comfy_nodes, wan, change=change, **late)
        assert run.summary.dense.get("refresh of the residuals", 0) == max(0, refreshes - 1) * FAMILY.calls
        assert run.without == (0 if refreshes else len(run.sparse)) and run.latent.isfinite().all()
        found.append(asked)
    assert found == [[], [(torch.device("cpu"), 2)]]
    assert run.summary.residuals.startswith("none: they need 1 MiB, and they may take 50% of what is free")
    assert "no refreshes: they need 1 MiB" in caplog.text


def apart(patched):
    """From the fourth evaluation on, make ComfyUI evaluate the conditions one by one for want of memory."""
    model, required = patched.model, patched.model.memory_required
    from comfy.patcher_extension import CallbacksMP

    def shrink(patcher, timestep, options, *rest):
        override = options["transformer_options"]["optimized_attention_override"]
        model.memory_required = (lambda *args, **kwargs: 1e18) if override.run.steps >= 4 else required

    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "shrink", shrink)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, "restore",
                                  lambda patcher: setattr(model, "memory_required", required))


def test_conditions_evaluated_together_and_then_apart(comfy_nodes, wan):
    guided = {"cfg": 3.0}
    together = Run(comfy_nodes, wan, sampling=guided)
    changing = Run(comfy_nodes, wan, sampling=guided, change=apart)
    assert {batch for batch, _ in together.sparse} == {2} and {batch for batch, _ in changing.sparse} == {1, 2}
    assert together.without == changing.without == 0
    torch.testing.assert_close(together.latent, changing.latent, rtol=1e-3, atol=1e-3)


def test_context_windows_have_their_own(comfy_nodes, wan):
    import comfy.context_windows as windows

    def window(patched):
        patched.model_options["context_handler"] = windows.IndexListContextHandler(
            context_schedule=windows.get_matching_context_schedule("standard_static"),
            fuse_method=windows.get_matching_fuse_method("flat"), context_length=2, context_overlap=0, context_stride=1,
            closed_loop=False, dim=2)

    family = replace(FAMILY, latent=(1, 16, 4, 32, 32))
    run = Run(comfy_nodes, wan, family=family, change=window)
    assert len(run.sparse) == 2 * (STEPS - 3) * family.calls and run.without == 0
    made = {residual.quantised.data_ptr() for _, residual in run.sparse}
    assert len(made) > family.calls


def test_what_can_not_be_told_apart_gets_none(comfy_nodes, wan):
    """A node that samples a picture in tiles evaluates the model once for each, with one condition."""
    def in_two(apply_model, given):
        for tile in (given["input"], given["input"].flip(-1)):
            out = apply_model(tile, given["timestep"], **given["c"])
        return out

    run = Run(comfy_nodes, wan, change=lambda patched: patched.set_model_unet_function_wrapper(in_two))
    assert len(run.dense) == 2 * 3 * FAMILY.calls and run.sparse and run.without == len(run.sparse)


@pytest.mark.parametrize("sampler", ("heun", "res_multistep", "dpmpp_2m", "uni_pc", "ddim"))
def test_samplers(comfy_nodes, wan, sampler):
    run = Run(comfy_nodes, wan, sampling={"sampler": sampler})
    assert run.latent.isfinite().all() and run.without == 0
    # One evaluation for each refresh, and every one at the level that the schedule was divided at, or just below it.
    assert len(run.dense) == 3 * FAMILY.calls
    for due in run.dense[::FAMILY.calls]:
        assert any(due <= level * 1.0001 for level in schedule(wan))


@pytest.mark.parametrize("sampler", ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "lcm", "er_sde"))
def test_samplers_that_add_noise_have_no_refreshes(comfy_nodes, wan, sampler, caplog):
    """What they add changes attention more than a step does."""
    with caplog.at_level(logging.INFO):
        run = Run(comfy_nodes, wan, sampling={"sampler": sampler})
    assert run.latent.isfinite().all() and run.dense == [] and run.without == len(run.sparse) > 0
    assert "residuals none: the sampler adds noise between steps" in caplog.text


def test_noise_of_the_samplers_of_comfyui(comfy_nodes):
    import comfy.samplers

    adds_noise = comfy_host.pack_module(comfy_nodes, "nodes.run.sampler_noise").adds_noise
    found = {name for name in comfy.samplers.SAMPLER_NAMES if adds_noise(comfy.samplers.sampler_object(name))}
    named = {name for name in comfy.samplers.SAMPLER_NAMES if "ancestral" in name or "sde" in name}
    assert named | {"lcm", "ddpm", "sa_solver", "seeds_2", "seeds_3"} <= found
    assert not found & {"euler", "euler_cfg_pp", "heun", "dpm_2", "lms", "dpmpp_2m", "ddim", "uni_pc", "uni_pc_bh2",
                        "deis", "ipndm", "res_multistep", "gradient_estimation", "dpm_fast", "dpm_adaptive"}


def test_part_of_a_schedule(comfy_nodes, wan):
    """As image to image has it."""
    run = Run(comfy_nodes, wan, sampling={"denoise": 0.6, "steps": 10})
    assert run.dense and max(run.dense) < schedule(wan)[0] and run.without == 0


def test_few_steps(comfy_nodes, wan, caplog):
    with caplog.at_level(logging.INFO):
        run = Run(comfy_nodes, wan, sampling={"steps": 4})
    assert run.dense == [] and run.without == len(run.sparse) > 0
    assert "residuals none: 4 steps may go sparse, and it takes 6" in caplog.text


def test_the_next_run_is_the_same_and_nothing_stays(comfy_nodes, wan):
    import comfy.model_management

    run = Run(comfy_nodes, wan)

    def interrupt(step, *rest):
        if step == 4:
            assert list(run.override.run.residuals._entries)
            raise comfy.model_management.InterruptProcessingException()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(run.patched, FAMILY, steps=STEPS, callback=interrupt)
    assert not list(run.override.run.residuals._entries)
    assert torch.equal(sample(run.patched, FAMILY, steps=STEPS), run.latent)
    assert not list(run.override.run.residuals._entries)


def test_failing_to_make_one_costs_no_run(comfy_nodes, wan):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    with mock.patch.object(kernel_calls(comfy_nodes), "attention_residual", fails):
        run = Run(comfy_nodes, wan)
    assert run.latent.isfinite().all() and run.without == len(run.sparse) > 0


def test_idle_models_are_unloaded_by_comfyui(comfy_nodes, caplog):
    """Those of the run stay. An error in ComfyUI's functions costs no run."""
    import comfy.model_management as manager

    make_room = comfy_host.pack_module(comfy_nodes, "nodes.host").shared_memory().make_room
    loaded, gpu = [mock.Mock(currently_used=used) for used in (True, False)], torch.device("cuda", 0)
    with (mock.patch.object(manager, "current_loaded_models", loaded),
          mock.patch.object(manager, "get_free_memory", lambda device: 1000),
          mock.patch.object(manager, "free_memory") as free):
        make_room(gpu, 500)
        make_room(torch.device("cpu"), 500)
    free.assert_called_once_with(1500, gpu, keep_loaded=loaded[:1])
    with mock.patch.object(manager, "free_memory", None):
        make_room(torch.device("meta"), 500)
    assert "could not unload idle models" in caplog.text


def test_memory_by_comfyuis_books(comfy_nodes):
    import comfy.model_management as manager

    memory, x = comfy_host.pack_module(comfy_nodes, "nodes.host").shared_memory(), torch.zeros(1 << 22)
    assert memory.free(x.device) > 0
    before = manager.TOTAL_PINNED_MEMORY
    assert memory.pin(x) == (manager.MAX_PINNED_MEMORY > 0)
    assert manager.TOTAL_PINNED_MEMORY == before + (x.nbytes if manager.MAX_PINNED_MEMORY > 0 else 0)
    memory.unpin(x)
    assert manager.TOTAL_PINNED_MEMORY == before

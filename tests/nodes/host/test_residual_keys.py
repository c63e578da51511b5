"""Whose residual a call gets in real sampling runs: by content, the one of the call that is the most like it."""
import gc
import threading
import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import checkpoints
import pytest
import torch
from sampling import SPARSE, apply, condition, node_class, sample
from test_residuals import apart, kernel_calls

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

VIDEO = replace(checkpoints.FAMILIES["wan"], latent=(1, 16, 2, 32, 32))  # 512 tokens
PICTURE = replace(checkpoints.FAMILIES["flux"], latent=(1, 16, 64, 48))  # 768 tokens beside 48 of text
STEPS = 8


@pytest.fixture(scope="module")
def video(comfy_nodes, tmp_path_factory):
    return checkpoints.written(VIDEO, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def picture(comfy_nodes, tmp_path_factory):
    return checkpoints.written(PICTURE, tmp_path_factory.mktemp("checkpoints"))


class Traced:
    """A run whose residuals are numbers: zero but for their scales, which tell what each was made of.

    made: (evaluation, q) of each batch entry of a refresh, by that number.
    used: (q, number) of each batch entry that got a residual.
    without: batch entries of sparse calls that got none.
    """

    def __init__(self, comfy_nodes, model, **widgets):
        self.patched = apply(comfy_nodes, model, selection=SPARSE, refreshes=3, **widgets)
        self.override = self.patched.model_options["transformer_options"]["optimized_attention_override"]
        self._module, self.made, self.used, self.without = kernel_calls(comfy_nodes), [], [], 0
        self._lock = threading.Lock()

    @contextmanager
    def tracing(self):
        attention, residual_of = self._module.sparge_attention, self._module.attention_residual

        def make(q, *rest, **how):
            made = residual_of(q, *rest, **how)
            made.quantised.zero_()
            with self._lock:
                made.scale[:] = torch.arange(len(self.made), len(self.made) + len(q))[:, None, None]
                self.made += [(self.override.run.steps, x.clone()) for x in q]
            return made

        def attend(q, *rest, residual=None, **how):
            with self._lock:
                if residual is None:
                    self.without += len(q)
                else:
                    self.used += zip(q.clone(), residual.scale[:, 0, 0].int().tolist())
            return attention(q, *rest, residual=residual, **how)

        with (mock.patch.object(self._module, "sparge_attention", attend),
              mock.patch.object(self._module, "attention_residual", make)):
            yield self

    def sample(self, family, **sampling):
        with self.tracing():
            self.latent = sample(self.patched, family, **{"steps": STEPS, **sampling})
        return self

    def check(self):
        """That of all that was made in one evaluation, each call got what is nearest to it. In the first layer of some
        models, conditions still are the same."""
        assert self.used and self.latent.isfinite().all()
        for q, number in self.used:
            evaluation, own = self.made[number]
            others = [other for i, (at, other) in enumerate(self.made)
                      if at == evaluation and i != number and other.shape == q.shape]
            nearest = min((q - other).norm() for other in others)
            assert (q - own).norm() <= nearest * 1.0001
        return self


@pytest.mark.parametrize("change", (lambda patched: None, apart), ids=("together", "apart from a step on"))
def test_conditions(comfy_nodes, video, change):
    run = Traced(comfy_nodes, video)
    change(run.patched)
    assert run.sample(VIDEO, cfg=3.0).check().without == 0


def test_a_guidance_that_comes_at_a_later_step(comfy_nodes, video):
    """What was not there at the last refresh has no residual until the next one."""
    negative = condition(VIDEO, seed=2)
    negative[0][1]["start_percent"] = 0.3
    run = Traced(comfy_nodes, video).sample(VIDEO, cfg=3.0, negative=negative).check()
    assert run.without > 0 and len(run.used) > run.without


def regions(**of_each):
    """Two conditions for parts of a picture; of_each: what tells the parts, two values an entry."""
    made = [condition(PICTURE, seed=seed)[0] for seed in (1, 2)]
    for i, (_, extra) in enumerate(made):
        extra |= {key: values[i] for key, values in of_each.items()}
    return made


HALVES = [torch.zeros(1, 64, 48) for _ in range(2)]
HALVES[0][:, :32] = HALVES[1][:, 32:] = 1


@pytest.mark.parametrize("parts", (
    dict(area=[(40, 48, 0, 0), (40, 48, 24, 0)]), dict(area=[(64, 48, 0, 0), (40, 48, 24, 0)]), dict(mask=HALVES)),
    ids=("areas", "areas of two sizes", "masks"))
def test_regional_prompts(comfy_nodes, picture, parts):
    run = Traced(comfy_nodes, picture).sample(PICTURE, positive=regions(**parts)).check()
    assert run.without == 0 and len(run.used) == 2 * (STEPS - 3) * PICTURE.calls


def test_a_control_net(comfy_nodes, picture):
    """Conditions with another control are evaluated apart."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x, *rest):
            return {"input": [torch.full((1, 4, 256), self.strength)], "middle": [], "output": []}

    one, two = Control(), Control()
    two.strength = -1.0
    run = Traced(comfy_nodes, picture).sample(PICTURE, positive=regions(control=[one, two])).check()
    assert run.without == 0


def test_a_guidance_that_skips_layers(comfy_nodes, picture):
    """It evaluates the same condition once more in each step."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    run = Traced(comfy_nodes, SkipLayerGuidanceDiT.execute(picture, 2.0, 0.3, 1.0, "", "1").result[0])
    run.sample(PICTURE, cfg=3.0).check()


def test_a_guidance_that_perturbs_attention(comfy_nodes, tmp_path_factory):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    family = checkpoints.FAMILIES["sdxl"]
    model = checkpoints.written(family, tmp_path_factory.mktemp("checkpoints"))
    run = Traced(comfy_nodes, PerturbedAttentionGuidance.execute(model, 2.0).result[0])
    assert run.sample(family, cfg=3.0).check().without == 0


def test_batches_of_other_sizes(comfy_nodes, video):
    run = Traced(comfy_nodes, video)
    for batch in (1, 2, 1):
        run.made.clear()
        run.used.clear()
        assert run.sample(VIDEO, batch=batch).check().without == 0


def test_two_samplers_in_turn(comfy_nodes, video):
    """On one patched model, step by step. They share a record of the run, in which a refresh is one evaluation: that of
    the one which comes first to its noise level. The other one gets nothing of it. Each has its own conditions, and its
    own noise, because what the first layer makes of conditions differs little."""
    run, turns, failed = Traced(comfy_nodes, video), (threading.Semaphore(1), threading.Semaphore(0)), []

    def one(place):
        mine, others = turns[place], turns[1 - place]

        def hand_over(*args):
            others.release()
            assert mine.acquire(timeout=60), "the other one did not hand over"

        try:
            assert mine.acquire(timeout=60), "the other one did not hand over"
            run.latent = sample(run.patched, VIDEO, steps=STEPS, positive=condition(VIDEO, seed=place + 1), seed=place,
                                callback=hand_over)
        except BaseException as error:
            failed.append(error)
        finally:
            others.release()

    with run.tracing():
        threads = [threading.Thread(target=one, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert run.check().without > 0


def unload():
    import comfy.model_management

    comfy.model_management.unload_all_models()


def stop():
    raise RuntimeError("a node failed")


@pytest.mark.parametrize("happens", (lambda: None, unload, stop), ids=("nothing", "models are unloaded", "an error"))
def test_nothing_outlives_a_run(comfy_nodes, video, happens):
    run = Traced(comfy_nodes, video)
    expected, kept = sample(run.patched, VIDEO, steps=STEPS), []

    def at(step, *rest):
        if step == 4:
            kept.extend(weakref.ref(entry.whole) for entry in run.override.run.residuals._entries)
            happens()

    try:
        latent = sample(run.patched, VIDEO, steps=STEPS, callback=at)
        assert torch.equal(latent, expected)
    except RuntimeError:
        assert happens is stop
    gc.collect()
    assert kept and not any(made() for made in kept)


def test_the_node_sees_no_workflow(comfy_nodes):
    """So that none can hold anything of a run."""
    assert not node_class(comfy_nodes).define_schema().hidden


def test_what_is_counted_is_what_they_take(comfy_nodes, video, caplog):
    run, taken = Traced(comfy_nodes, video, start_percent=0.5), []

    def at(step, *rest):
        store = run.override.run.residuals
        wholes = {id(entry.whole): entry.whole for entry in store._entries}
        taken.append((sum(whole.bytes for whole in wholes.values()), store.most_bytes, store.room.counted))

    sample(run.patched, VIDEO, steps=2 * STEPS, cfg=3.0, callback=at)
    heads, head_dim = 2, 128
    assert taken[0] == (0, 0, 0)
    assert taken[-1] == 3 * (2 * VIDEO.calls * heads * 512 * (head_dim + 4),)
    assert "counted before" in run.override.run.summary.residuals

"""A failure injected at each stage of a sampling run: what it ends, and that nothing of it is left afterwards.

What the attention call raises ends the run unchanged, but for the two errors after which dense attention can take over.
Hints, reports and statistics never end a run.
"""
import gc
import logging
from dataclasses import replace

import checkpoints
import comfy_host
import pytest
import torch
from sampling import SPARSE, apply, sample

FAMILY = replace(checkpoints.FAMILIES["wan"], latent=(1, 16, 2, 32, 32))  # 512 tokens
STEPS = 2
SLOT = "optimized_attention_override"
# (module, class or None, function) of this pack.
CALL = {"arguments": ("call.arguments", "AttentionCall", "parse"), "plan": ("call.entry", None, "plan_call"),
        "attention": ("run.kernel_calls", None, "sparge_attention"),
        "result": ("call.arguments", "AttentionCall", "give_back")}
HOOKS = {"on_pre_run": ("run.state", "RunState", "begin"), "on_prepare_state": ("run.state", "RunState", "next_step")}
BOOKS = {"expected tokens": ("call.model_rules", None, "expectation"),
         "token layout": ("call.token_layout", "Expectation", "layout"),
         "block map": ("run.kernel_calls", None, "block_map"), "picture of a map": ("run.block_maps", None, "shrink"),
         "pictures": ("run.block_maps", "BlockPictures", "fetch"), "statistics": ("run.summary", "RunSummary", "of")}
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


def module(comfy_nodes, name):
    return comfy_host.pack_module(comfy_nodes, f"nodes.{name}")


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(FAMILY, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def inject(comfy_nodes):
    """inject(place, error, at): `place` raises `error` at its call number `at`, from 0 on, or at each where it is None.

    Returns a function that ends it and tells how often it happened.
    """

    def start(place, error, at=None):
        name, class_name, attribute = place
        owner = module(comfy_nodes, name)
        if class_name:
            owner = getattr(owner, class_name)
        real, calls, raised = getattr(owner, attribute), 0, 0

        def failing(*args, **kwargs):
            nonlocal calls, raised
            calls += 1
            if at is None or calls == at + 1:
                raised += 1
                raise error
            return real(*args, **kwargs)

        bound = isinstance(vars(owner)[attribute], classmethod)
        patch = pytest.MonkeyPatch()
        patch.setattr(owner, attribute, staticmethod(failing) if bound else failing)

        def stop():
            patch.undo()
            error.__traceback__ = None  # its frames hold the tensors of the call
            return raised

        stops.append(stop)
        return stop

    stops = []
    yield start
    for stop in stops:
        stop()


def run(model):
    return sample(model, FAMILY, steps=STEPS)


def live_tensors():
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


class Check:
    """What must hold after a fault as before it, for a patched model and the raw one that it was made from."""

    def __init__(self, raw, patched):
        self.raw, self.patched = raw, patched
        self.dense, self.expected = run(raw), run(patched)
        assert not torch.equal(self.expected, self.dense)

    def begin(self):
        self.tensors = live_tensors()
        return self

    def nothing_is_left(self):
        for handler in logging.getLogger().handlers:  # pytest's keep exceptions, whose frames hold tensors
            getattr(handler, "records", []).clear()
        override = self.patched.model_options["transformer_options"][SLOT]
        while override is not None:
            assert not override.run.running
            assert live_tensors() <= self.tensors
            override = override.previous
        assert SLOT not in self.raw.model_options["transformer_options"]
        assert not any(self.raw.wrappers.values()) and not any(self.raw.callbacks.values())
        assert torch.equal(run(self.patched.clone()), self.expected)
        assert torch.equal(run(self.raw), self.dense)


@pytest.fixture(scope="module")
def single(comfy_nodes, wan):
    """One for all tests, each of which leaves the models as they were."""
    return Check(wan, apply(comfy_nodes, wan, selection=SPARSE))


@pytest.fixture(scope="module")
def chain(comfy_nodes, wan):
    """The first of two overrides declines all calls, which it hands on to the second."""
    return Check(wan, apply(comfy_nodes, apply(comfy_nodes, wan, selection=SPARSE), min_tokens=100_000))


@pytest.fixture
def check(single):
    return single.begin()


def ends_in(error, model):
    """Run `model`, which must raise this very object."""
    try:
        run(model)
    except BaseException as raised:  # an interruption is one that is no Exception
        assert raised is error
        return
    raise AssertionError(f"the run ended well, without {error!r}")


@pytest.mark.parametrize("at", (0, 3))
@pytest.mark.parametrize("stage", CALL)
def test_an_error_in_a_call_ends_the_run_unchanged(check, inject, stage, at):
    error = RuntimeError("a fault")
    stop = inject(CALL[stage], error, at)
    ends_in(error, check.patched)
    assert stop() == 1
    check.nothing_is_left()


@pytest.mark.parametrize("stage", CALL)
def test_an_error_in_a_call_of_the_second_of_two_overrides(chain, inject, stage):
    error = RuntimeError("a fault")
    chain.begin()
    stop = inject(CALL[stage], error, 3)
    ends_in(error, chain.patched)
    assert stop() == 1
    chain.nothing_is_left()


@pytest.mark.parametrize("at", (0, 3))
def test_an_error_of_the_device_is_never_swallowed(check, inject, at):
    error = RuntimeError(ILLEGAL_ACCESS)
    stop = inject(CALL["attention"], error, at)
    ends_in(error, check.patched)
    assert stop() == 1
    check.nothing_is_left()


def test_an_error_of_the_device_is_not_hidden_by_one_in_the_books(check, inject):
    error = RuntimeError(ILLEGAL_ACCESS)
    stop, stop_books = inject(CALL["attention"], error, 3), inject(BOOKS["statistics"], RuntimeError("the books"))
    ends_in(error, check.patched)
    assert stop() == 1 and stop_books()
    check.nothing_is_left()


@pytest.mark.parametrize("stage", ("arguments", "attention"))
def test_an_interruption_in_a_call(check, inject, stage):
    from comfy.model_management import InterruptProcessingException

    error = InterruptProcessingException()
    stop = inject(CALL[stage], error, 3)
    ends_in(error, check.patched)
    assert stop() == 1
    check.nothing_is_left()


def fast_path_error(comfy_nodes):
    return module(comfy_nodes, "run.kernel_calls").FastPathError("no C compiler found; install gcc")


def out_of_memory(comfy_nodes):
    return torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory")


@pytest.mark.parametrize("make", (fast_path_error, out_of_memory))
def test_calls_that_can_not_be_sparse_go_dense(comfy_nodes, check, inject, caplog, make):
    """All of them here, so that the picture is the raw model's, bit for bit; and the log says why, once."""
    error = make(comfy_nodes)
    stop = inject(CALL["attention"], error)
    with caplog.at_level("INFO"):
        assert torch.equal(run(check.patched), check.dense)
    assert stop() == FAMILY.calls * STEPS
    reason = "no C compiler found; install gcc" if make is fast_path_error else "memory"
    said = [record.getMessage() for record in caplog.records if "dense attention" in record.getMessage()
            and reason in record.getMessage()]
    assert len(said) == 1
    check.nothing_is_left()


@pytest.mark.parametrize("make", (fast_path_error, out_of_memory))
def test_one_call_that_can_not_be_sparse(comfy_nodes, check, inject, make):
    stop = inject(CALL["attention"], make(comfy_nodes), 3)
    latent = run(check.patched)
    assert stop() == 1
    assert latent.isfinite().all() and not torch.equal(latent, check.expected) and not torch.equal(latent, check.dense)
    del latent
    check.nothing_is_left()


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_a_callback_leaves_nothing(check, inject, hook):
    """Without a run or a step, nothing tells which calls may be sparse."""
    error = RuntimeError("a fault")
    stop = inject(HOOKS[hook], error, 0)
    ends_in(error, check.patched)
    assert stop() == 1
    check.nothing_is_left()


@pytest.mark.parametrize("stage", BOOKS)
def test_an_error_in_the_books_does_not_end_a_run(comfy_nodes, check, inject, stage):
    stop = inject(BOOKS[stage], RuntimeError("a fault"))
    latent = run(check.patched)
    assert stop() > 0
    assert torch.equal(latent, check.expected)
    report = comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnReport"]
    samples = {"samples": latent}
    output = report.execute(model=check.patched, samples=samples, block="", head=0, step=0, theme="dark")
    assert output.result[0] is samples
    del output, samples, latent
    check.nothing_is_left()

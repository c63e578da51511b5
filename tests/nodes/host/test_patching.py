"""The patch lives on the clone alone, takes its place among other patches, and leaves nothing behind."""
import asyncio
import gc
import logging
from dataclasses import replace

import checkpoints
import pytest
import torch
from sampling import SPARSE, apply, node_class, probed, sample

FAMILY = replace(checkpoints.FAMILIES["wan"], latent=(1, 16, 2, 32, 32))  # 512 tokens


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(FAMILY, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def dense(wan):
    return sample(wan, FAMILY)


def dense_sigmas(comfy_nodes, wan, steps=5, **widgets):
    """Noise levels of the self-attention calls that stayed dense, one entry a call, in order."""
    below, probe = probed(wan)
    sample(apply(comfy_nodes, below, **widgets), FAMILY, steps=steps)
    return probe.declined


def schedule(wan, steps=5):
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(wan.get_model_object("model_sampling"), "simple", steps)[:-1].tolist()



def test_the_given_model_is_not_touched(comfy_nodes, wan, dense):
    apply(comfy_nodes, wan)
    assert "optimized_attention_override" not in wan.model_options["transformer_options"]
    assert not any(wan.wrappers.values()) and not any(wan.callbacks.values())
    assert torch.equal(sample(wan, FAMILY), dense)


def test_clones_of_the_patched_model_are_patched(comfy_nodes, wan, dense):
    patched = apply(comfy_nodes, wan, selection=SPARSE)
    expected = sample(patched, FAMILY)
    assert not torch.equal(expected, dense)
    assert torch.equal(sample(patched.clone().clone(), FAMILY), expected)
    assert torch.equal(sample(patched, FAMILY), expected)


def test_two_branches_of_one_model_keep_their_own_settings(comfy_nodes, wan, dense):
    """Runs alternate between a sparse branch, a branch that is never sparse, and the model itself."""
    sparse = apply(comfy_nodes, wan, selection=SPARSE)
    idle = apply(comfy_nodes, wan, selection=SPARSE, min_tokens=100_000)
    first = sample(sparse, FAMILY)
    assert torch.equal(sample(idle, FAMILY), dense)
    assert torch.equal(sample(wan, FAMILY), dense)
    assert torch.equal(sample(sparse, FAMILY), first)


def test_another_resolution_and_batch_afterwards(comfy_nodes, wan):
    patched = apply(comfy_nodes, wan, selection=SPARSE)
    larger = replace(FAMILY, latent=(1, 16, 3, 40, 24))
    for family, batch in ((FAMILY, 1), (larger, 1), (larger, 2), (FAMILY, 1)):
        assert sample(patched, family, batch=batch).isfinite().all()



def test_declined_calls_go_to_the_override_that_was_there(comfy_nodes, wan):
    below, probe = probed(wan)
    sample(apply(comfy_nodes, below), FAMILY, steps=2)
    # Wan's two blocks attend to themselves (sparse) and to 48 text tokens (declined), once a step.
    assert [(queries, keys) for _, queries, keys in probe.calls] == [(512, 48)] * 4


def test_core_attention_backend_before_serves_declined_calls(comfy_nodes, wan):
    from comfy.ldm.modules.attention import attention_basic

    below = wan.clone()
    below.set_model_optimized_attention(attention_basic)
    assert torch.equal(sample(apply(comfy_nodes, below, min_tokens=100_000), FAMILY), sample(below, FAMILY))


def test_core_attention_backend_is_named_as_users_know_it(comfy_nodes, wan, caplog):
    from comfy_extras.nodes_model_advanced import ModelAttentionBackend

    backend = ModelAttentionBackend()
    with caplog.at_level(logging.INFO):
        sample(apply(comfy_nodes, backend.patch(wan, "pytorch attention")[0]), FAMILY)
        sample(backend.patch(apply(comfy_nodes, wan), "pytorch attention")[0], FAMILY)
    found, on_top = (line for line in pack_lines(caplog) if "Model Attention Backend" in line)
    assert "calls that stay dense go on to" in found and "put Apply SpargeAttn after the node" in on_top
    assert "<locals>" not in caplog.text


def test_override_after_ours_replaces_it(comfy_nodes, wan, dense):
    replaced, probe = probed(apply(comfy_nodes, wan, selection=SPARSE))
    assert torch.equal(sample(replaced, FAMILY), dense)
    assert len(probe.declined) == 2 * FAMILY.calls


def test_applied_twice(comfy_nodes, wan):
    """What the outer patch declines goes to the inner one, as to any other override; nothing loops."""
    below, probe = probed(wan)
    inner = apply(comfy_nodes, below, selection=SPARSE)
    expected = sample(inner, FAMILY)
    assert torch.equal(sample(apply(comfy_nodes, inner, min_tokens=100_000), FAMILY), expected)
    assert probe.declined == []



@pytest.mark.parametrize("start, end", ((0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (0.3, 0.6), (1.0, 1.0)))
def test_start_and_end_percent(comfy_nodes, wan, start, end):
    to_sigma = wan.get_model_object("model_sampling").percent_to_sigma
    inside = [to_sigma(end) <= sigma <= to_sigma(start) for sigma in schedule(wan)]
    if (start, end) == (0.3, 0.6):
        assert any(inside) and not all(inside)
    expected = [sigma for sigma, sparse in zip(schedule(wan), inside) if not sparse for _ in range(FAMILY.calls)]
    assert dense_sigmas(comfy_nodes, wan, start_percent=start, end_percent=end) == pytest.approx(expected)


def test_window_follows_a_shift_patched_later(comfy_nodes, wan):
    """ModelSamplingSD3 and its kind come after the node in many workflows."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    below, probe = probed(wan)
    patched = ModelSamplingSD3().patch(apply(comfy_nodes, below, start_percent=0.5), 1.0)[0]
    sample(patched, FAMILY, steps=5)
    to_sigma = patched.get_model_object("model_sampling").percent_to_sigma
    expected = [sigma for sigma in schedule(patched) if sigma > to_sigma(0.5) for _ in range(FAMILY.calls)]
    assert probe.declined == pytest.approx(expected) and len(expected) > 0


@pytest.mark.parametrize("blocks, share", (("", 0), ("0", 1), ("1", 1), ("0-1", 2), ("0, 1", 2), ("7", 0)))
def test_dense_blocks(comfy_nodes, wan, blocks, share):
    assert len(dense_sigmas(comfy_nodes, wan, steps=2, dense_blocks=blocks)) == 2 * share


def test_blocks_that_the_model_lacks_are_named(comfy_nodes, wan, caplog):
    with caplog.at_level(logging.INFO):
        sample(apply(comfy_nodes, wan, dense_blocks="1, 99, foo:3"), FAMILY)
    [line] = [line for line in pack_lines(caplog) if "has no attention" in line]
    assert line.endswith(": 99, foo:3")


@pytest.mark.parametrize("blocks", ("x", "3-1", "0,,-2", "1.5"))
def test_dense_blocks_that_are_not_numbers_are_refused(comfy_nodes, wan, blocks):
    with pytest.raises(ValueError, match="dense_blocks"):
        apply(comfy_nodes, wan, dense_blocks=blocks)


def refused(**widgets):
    """(widget, message) of what the editor shows at the node before a prompt runs."""
    import execution

    inputs = {"model": ["loader", 0], "selection": "cdf", "selection.cdf_threshold": 0.98, "min_tokens": 512,
              "selection.similarity_threshold": 0.6, "pv_threshold": 50.0, "start_percent": 0.0, "end_percent": 1.0,
              "skipped_blocks": "drop", "pv_precision": "auto", "dense_blocks": "", "verbose": False, **widgets}
    prompt = {"loader": {"class_type": "UNETLoader", "inputs": {"unet_name": "", "weight_dtype": "default"}},
              "patch": {"class_type": "ApplySpargeAttn", "inputs": inputs}}
    _, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "patch", {}))
    return [(error["extra_info"]["input_name"], error["details"]) for error in errors]


def test_a_bad_list_is_one_error_at_its_widget(comfy_nodes):
    [(widget, message)] = refused(dense_blocks="0, x")
    assert widget == "dense_blocks" and "got 'x'" in message
    assert refused(dense_blocks="0，1") == refused() == []


@pytest.mark.parametrize("tokens", (0, 1, 1024, 2048, 4096))
def test_min_tokens_that_the_editor_can_hold(comfy_nodes, tokens):
    """Its steps start at the least value; prompts saved with other values still run."""
    [widget] = [entry for entry in node_class(comfy_nodes).define_schema().inputs if entry.id == "min_tokens"]
    assert tokens == 1 or (tokens - widget.min) % widget.step == 0
    assert refused(min_tokens=tokens) == []


def test_window_that_ends_before_it_starts_is_refused(comfy_nodes, wan):
    with pytest.raises(ValueError, match="start_percent must be at most end_percent; got 0.8 and 0.2"):
        apply(comfy_nodes, wan, start_percent=0.8, end_percent=0.2)



def live_tensors():
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


def check_nothing_is_left(wan, dense, patched, end_early):
    """`end_early()` stops a run of `patched`: the next runs are as if it had never been, and no tensor stays."""
    expected = sample(patched, FAMILY)
    before = live_tensors()
    end_early()
    assert live_tensors() <= before
    assert torch.equal(sample(patched, FAMILY), expected)
    assert torch.equal(sample(wan, FAMILY), dense)


def test_interrupted_run_leaves_nothing(comfy_nodes, wan, dense):
    """The user stops the run after its first step."""
    import comfy.model_management

    patched = apply(comfy_nodes, wan, selection=SPARSE)

    def end_early():
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patched, FAMILY, steps=3,
                   callback=lambda *_: comfy.model_management.interrupt_current_processing())

    check_nothing_is_left(wan, dense, patched, end_early)


def test_failed_run_leaves_nothing(comfy_nodes, wan, dense):
    """Attention runs out of memory between two sparse calls."""
    below, failing = wan.clone(), []

    def fail(func, *args, **kwargs):
        if failing:
            raise MemoryError("attention")
        return func(*args, **kwargs)

    below.model_options["transformer_options"]["optimized_attention_override"] = fail
    patched = apply(comfy_nodes, below, selection=SPARSE)

    def end_early():
        failing.append(True)
        with pytest.raises(MemoryError, match="attention"):
            sample(patched, FAMILY)
        failing.clear()

    check_nothing_is_left(wan, dense, patched, end_early)


def test_runs_leave_no_tensors(comfy_nodes, wan):
    patched = apply(comfy_nodes, wan, selection=SPARSE)
    sample(patched, FAMILY)
    before = live_tensors()
    sample(patched, FAMILY)
    assert live_tensors() <= before



def pack_lines(caplog):
    return [record.getMessage() for record in caplog.records if "SpargeAttn" in record.getMessage()]


def test_summary_counts_the_calls(comfy_nodes, wan, caplog):
    with caplog.at_level(logging.INFO):
        sample(apply(comfy_nodes, wan, selection=SPARSE), FAMILY, steps=3)
    text = "\n".join(pack_lines(caplog))
    assert "6 attention calls sparse" in text and "cross-attention" in text, text


def test_reasons_are_said_once(comfy_nodes, wan, caplog):
    with caplog.at_level(logging.INFO):
        sample(apply(comfy_nodes, wan, min_tokens=100_000), FAMILY, steps=4)
    lines = [line for line in pack_lines(caplog) if "min_tokens" in line]
    assert 1 <= len(lines) <= 2, lines  # the reason when it first occurs, and the summary


def test_a_run_without_sparse_calls_says_so(comfy_nodes, wan, caplog):
    with caplog.at_level(logging.INFO):
        sample(apply(comfy_nodes, wan, min_tokens=100_000), FAMILY)
    assert any(record.levelno >= logging.WARNING and "SpargeAttn" in record.getMessage() for record in caplog.records)

"""SpargeAttn Report after real sampling runs."""
import os
import sys

import checkpoints
import pytest
from sampling import SPARSE, apply, sample

WAN = checkpoints.FAMILIES["wan"]


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "wan.safetensors"
    checkpoints.write(WAN, path)
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path))


def report(comfy_nodes, model, latent, **widgets):
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnReport"]
    output = node.execute(model=model, samples={"samples": latent},
                          **{"block": "", "head": 0, "step": 0, "theme": "dark", **widgets})
    return output.result, output.ui


def test_report_of_a_run(comfy_nodes, wan):
    patched = apply(comfy_nodes, wan, start_percent=0.4, selection=SPARSE)
    latent = sample(patched, WAN, steps=4, cfg=3.0)
    (samples, picture, text), shown = report(comfy_nodes, patched.clone(), latent)
    assert samples["samples"] is latent
    assert picture.shape[0] == 1 and picture.shape[2:] == (768, 3) and 0 <= picture.min() < picture.max() <= 1
    assert "of the attention skipped" in text and "outside start_percent" in text and "saves no time" in text
    assert shown["text"] == [text] and shown["images"]


def within(prompt, node="3"):
    """What ComfyUI sets around the nodes of a prompt."""
    from comfy_execution.utils import CurrentNodeContext

    return CurrentNodeContext(prompt, node)


def test_run_of_an_earlier_prompt_is_called_so(comfy_nodes, wan):
    """Sampled once; later prompts report it with another head, or after sampling the model as loaded."""
    patched = apply(comfy_nodes, wan)
    with within("one"):
        latent = sample(patched, WAN)
        (_, _, own), _ = report(comfy_nodes, patched, latent)
    with within("two"):
        (_, _, cached), _ = report(comfy_nodes, patched, latent, head=1)
    with within("three"):
        (_, _, raw), _ = report(comfy_nodes, patched, sample(wan, WAN))
    with within("four"):
        (_, _, again), _ = report(comfy_nodes, patched, sample(patched, WAN))
    told = ["not sampled in this prompt" in text for text in (own, cached, raw, again)]
    assert told == [False, True, True, False]
    assert cached == raw and set(own.splitlines()) < set(cached.splitlines())


def test_sampling_without_steps(comfy_nodes, wan):
    import torch

    patched = apply(comfy_nodes, wan)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    patched.pre_run()
    patched.cleanup()
    (_, _, text), _ = report(comfy_nodes, patched, torch.zeros(1))
    assert text.startswith("The sampler took no step") and override.run.summary.steps == 0


def test_run_that_a_handler_of_an_error_starts_is_complete(comfy_nodes, wan):
    """A node that tries again after an error."""
    patched = apply(comfy_nodes, wan)
    try:
        raise RuntimeError("the first try")
    except RuntimeError:
        latent = sample(patched, WAN)
    (_, _, text), _ = report(comfy_nodes, patched, latent)
    assert "skipped" in text.splitlines()[0]


def test_interrupted_run(comfy_nodes, wan):
    import comfy.model_management

    def interrupt(*args):
        raise comfy.model_management.InterruptProcessingException

    patched = apply(comfy_nodes, wan)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, WAN, callback=interrupt)
    (_, _, text), _ = report(comfy_nodes, patched, None)
    assert text.startswith("The run was interrupted")


def test_failing_picture_costs_no_latent(comfy_nodes, wan, monkeypatch):
    """The latent passes through the node to whatever decodes it."""
    patched = apply(comfy_nodes, wan)
    latent = sample(patched, WAN)
    module = sys.modules[comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnReport"].__module__]
    for function in ("draw_report", "run_report"):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, lambda *args: 1 / 0)
            (samples, picture, text), shown = report(comfy_nodes, patched, latent)
        assert samples["samples"] is latent and picture.ndim == 4
        assert text == "There is no report: division by zero" and shown == {"text": [text]}


def test_report_says_what_is_missing(comfy_nodes, wan):
    (_, _, text), _ = report(comfy_nodes, wan, None)
    assert "no Apply SpargeAttn on this model" in text and "bypassed" in text
    patched = apply(comfy_nodes, wan)
    (_, _, text), _ = report(comfy_nodes, patched, None)
    assert "has not been sampled yet" in text


def test_report_says_that_another_node_took_over(comfy_nodes, wan):
    patched = apply(comfy_nodes, wan).clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = \
        lambda func, *args, **kwargs: func(*args, **kwargs)
    latent = sample(patched, WAN)
    (_, _, text), _ = report(comfy_nodes, patched, latent)
    assert "Nothing was accelerated" in text and "took the model's attention over" in text


def test_next_run_keeps_the_chosen_map(comfy_nodes, wan):
    patched = apply(comfy_nodes, wan)
    sample(patched, WAN, steps=3)
    report(comfy_nodes, patched, None, block="1", step=3)
    sample(patched, WAN, steps=3)
    (_, picture, _), _ = report(comfy_nodes, patched, None, block="1", step=3)
    (_, without, _), _ = report(comfy_nodes, patched, None, block="1", step=3, head=9)
    assert picture.shape[1] > without.shape[1] + 100


def test_block_that_the_model_does_not_have_has_no_map(comfy_nodes, wan):
    patched = apply(comfy_nodes, wan)
    sample(patched, WAN)
    (_, kept, _), _ = report(comfy_nodes, patched, None, block="0")
    (_, none, _), _ = report(comfy_nodes, patched, None, block="77")
    assert kept.shape[1] > none.shape[1] + 100


def test_more_than_one_block_is_refused(comfy_nodes):
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnReport"]
    assert node.validate_inputs(block="single:3") is True
    assert "block" in node.validate_inputs(block="0-3") and "block" in node.validate_inputs(block="x")


def test_triton_keeps_kernels_in_the_user_folder(comfy_nodes):
    import folder_paths

    assert os.environ["TRITON_CACHE_DIR"].startswith(folder_paths.get_user_directory())

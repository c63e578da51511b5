"""SpargeAttn Report after real sampling runs."""
import os

import checkpoints
import pytest
from sampling import apply, sample

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
    patched = apply(comfy_nodes, wan, start_percent=0.4)
    latent = sample(patched, WAN, steps=4, cfg=3.0)
    (samples, picture, text), shown = report(comfy_nodes, patched.clone(), latent)
    assert samples["samples"] is latent
    assert picture.shape[0] == 1 and picture.shape[2:] == (768, 3) and 0 <= picture.min() < picture.max() <= 1
    assert "of the attention skipped" in text and "outside start_percent" in text and "Sparse calls took" in text
    assert shown["text"] == [text] and shown["images"]


def test_report_says_what_is_missing(comfy_nodes, wan):
    (_, _, text), _ = report(comfy_nodes, wan, None)
    assert "no Apply SpargeAttn on this model" in text
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
    assert picture.shape[1] > without.shape[1] + 300


def test_more_than_one_block_is_refused(comfy_nodes):
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SpargeAttnReport"]
    assert node.validate_inputs(block="single:3") is True
    assert "block" in node.validate_inputs(block="0-3") and "block" in node.validate_inputs(block="x")


def test_triton_keeps_kernels_in_the_user_folder(comfy_nodes):
    import folder_paths

    assert os.environ["TRITON_CACHE_DIR"].startswith(folder_paths.get_user_directory())

"""The example that needs no download, as it ships, on a running server: its model, its nodes and ComfyUI's sampler."""
import json
import re
from pathlib import Path

import av
import comfy_server
import numpy as np
import pytest
from PIL import Image
from test_server import cpu_option, node

PROMPT = Path(__file__).parent / "prompts/demo_without_download.json"
TIMEOUT = 600  # seconds; on a busy machine the reference takes minutes
LEAST_PSNR = 30  # dB between the clips: on a CPU 44.1, 45.0 and 34.0 at seeds 42, 1 and 2, with the preset balanced


def only(prompt, kind):
    """The key of the one node of that type."""
    key, = (key for key, entry in prompt.items() if entry["class_type"] == kind)
    return key


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("demo")
    comfy_server.prepare(base)  # a fresh installation: no model but the pack's own
    with comfy_server.running(base, *cpu_option()) as running:
        yield running


@pytest.fixture(scope="module")
def run(server):
    """(prompt, outputs) of the example with a preview of each branch's pictures."""
    prompt = json.loads(PROMPT.read_text(encoding="utf-8"))
    stitched = prompt[only(prompt, "ImageStitch")]["inputs"]
    prompt |= {name: node("PreviewImage", images=stitched[name]) for name in ("image1", "image2")}
    entry, errors = server.run(prompt, TIMEOUT)
    assert not errors and entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return prompt, entry["outputs"]


def clip(server, output):
    """Pictures (T, H, W, 3) in 0..1 of a PreviewImage."""
    files = (server.base / "temp" / image["filename"] for image in output["images"])
    return np.stack([np.asarray(Image.open(file)) for file in files]) / 255


def test_clips_differ_little_and_show_the_scene(server, run):
    _, outputs = run
    dense, sparse = (clip(server, outputs[name]) for name in ("image1", "image2"))
    assert dense.shape == sparse.shape == (9, 256, 320, 3)
    error = np.square(dense - sparse).mean()
    assert 0 < error < 10 ** (-LEAST_PSNR / 10)
    red, green, blue = np.moveaxis(dense, -1, 0)
    assert ((red > 0.7) & (green < 0.3)).mean() > 0.02  # the star
    assert ((red > 0.7) & (green > 0.6) & (blue < 0.4)).mean() > 0.005  # the ring
    assert np.abs(np.diff(dense, axis=0)).mean() > 0.005  # they move


def test_video_holds_both_clips(server, run):
    prompt, outputs = run
    saved, = outputs[only(prompt, "SaveVideo")]["images"]
    with av.open(server.base / "output" / saved["subfolder"] / saved["filename"]) as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == 9 * [(2 * 320 + 8, 256)]


def test_report_tells_what_was_skipped(run):
    prompt, outputs = run
    report = outputs[only(prompt, "SpargeAttnReport")]
    share = re.search(r"([\d.]+)% of the attention skipped", report["text"][0])[1]
    assert float(share) > 25 and report["images"]


def test_every_scene_has_a_condition_of_its_own(comfy_nodes):
    scene = comfy_nodes.NODE_CLASS_MAPPINGS["EncodeSpargeAttnDemo"]
    entry, = scene.define_schema().inputs
    contexts = [scene.execute(name).result[0][0][0] for name in entry.options]
    assert len({context.numpy().tobytes() for context in contexts}) == len(entry.options) >= 5
    assert {tuple(context.shape) for context in contexts} == {(1, 11, 64)}


def test_decoding_is_comfyuis_preview(comfy_nodes):
    """Of a latent as the sampler gives it; a latent of another model is refused by name."""
    import torch
    from comfy.latent_formats import Wan21
    from latent_preview import Latent2RGBPreviewer

    decode = comfy_nodes.NODE_CLASS_MAPPINGS["DecodeSpargeAttnDemo"].execute
    latent = torch.randn(1, 16, 1, 4, 6)
    images = decode({"samples": Wan21().process_out(latent)}).result[0]
    assert images.shape == (1, 32, 48, 3)
    flat = latent.mean((-2, -1), keepdim=True).expand_as(latent)
    shown = Latent2RGBPreviewer(Wan21.latent_rgb_factors, Wan21.latent_rgb_factors_bias).decode_latent_to_preview(flat)
    decoded = decode({"samples": Wan21().process_out(flat)}).result[0]
    assert np.abs(decoded[0, 0, 0].numpy() - np.asarray(shown)[0, 0] / 255).max() < 0.01
    with pytest.raises(ValueError, match="samples must be a clip of the demo's model"):
        decode({"samples": torch.zeros(1, 4, 8, 8)})

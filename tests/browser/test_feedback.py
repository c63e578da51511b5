"""What the editor shows of a run: a line on Apply SpargeAttn, and a report that can be read where it opens."""
import json
import subprocess
from pathlib import Path

import pytest

from comfyui_spargeattn.tests.browser.editor import Editor, browser
from comfyui_spargeattn.tests.nodes.host import comfy_server

pytestmark = pytest.mark.comfy
HOST = comfy_server.REPOSITORY / "tests/nodes/host"
CHECKPOINT = "diffusion_models/tiny_wan.safetensors"
WRITE_CHECKPOINT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import checkpoints, comfy_host
comfy_host.configure(Path(sys.argv[2]))
checkpoints.write(checkpoints.FAMILIES["wan"], Path(sys.argv[2], "models", sys.argv[3]))
"""
SIZE = "type => [...app.graph._nodes.find(node => node.type === type).size]"
LINE = """() => app.graph._nodes.find(node => node.type === 'ApplySpargeAttn')
    .widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? ''"""
RECORD_LINES = """() => {
    window.lines = []
    app.api.addEventListener('progress_text', event => window.lines.push(event.detail.text))
}"""


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


# The sparse half has to take longer than the half second between two lines on a node.
PROMPT = {
    "1": node("UNETLoader", unet_name=Path(CHECKPOINT).name, weight_dtype="default"),
    "2": node("RandomConditioning", length=48, width=64, seed=1),
    "3": node("EmptyHunyuanLatentVideo", width=256, height=256, length=33, batch_size=1),
    "4": node("ApplySpargeAttn", model=["1", 0], selection="cdf", pv_threshold=50.0, start_percent=0.5, end_percent=1.0,
              skipped_blocks="drop", pv_precision="auto", dense_blocks="", min_tokens=512, verbose=False,
              **{"selection.cdf_threshold": 0.5, "selection.similarity_threshold": -1.0}),
    "5": node("KSampler", model=["4", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0], seed=7, steps=20,
              cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
    "6": node("SpargeAttnReport", model=["4", 0], samples=["5", 0], block="", head=0, step=0, theme="dark"),
}


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    base = tmp_path_factory.mktemp("feedback")
    comfy_server.prepare(base, models=[CHECKPOINT.split("/")])
    (base / "custom_nodes/random_conditioning").symlink_to(HOST / "random_conditioning", target_is_directory=True)
    subprocess.run([comfy_server.host_python(), "-c", WRITE_CHECKPOINT, HOST, base, CHECKPOINT], check=True)
    with comfy_server.running(base, "--cpu", "--disable-dynamic-vram") as server, browser() as chromium:
        yield Editor(chromium, server.url)


def test_new_report_is_large_and_a_saved_one_keeps_its_size(editor):
    editor.run("prompt => app.loadApiJson(prompt, 'fresh')", PROMPT)
    wide, tall = editor.run(SIZE, "SpargeAttnReport")
    assert wide >= 600 and tall >= 1000
    workflow, _ = editor.export()
    for saved in workflow["nodes"]:
        saved["size"] = [444, 555]
    editor.run("workflow => app.loadGraphData(workflow)", workflow)
    assert editor.run(SIZE, "SpargeAttnReport") == [444, 555]


def test_line_on_the_node_during_and_after_a_run(editor, screenshot):
    editor.run("prompt => app.loadApiJson(prompt, 'run')", PROMPT)
    editor.page.wait_for_timeout(1000)
    editor.run(RECORD_LINES)
    editor.run("() => app.queuePrompt(0)")
    editor.fit()
    editor.page.wait_for_function(f"() => ({LINE})().includes('skipped')")
    assert editor.run(LINE).endswith("% skipped · CPU reference")
    lines = editor.run("() => window.lines")  # a fast run shows each of them for less time than a poll takes
    for wanted in ("nothing sparse yet: outside start_percent", "sparse attention calls: "):
        assert any(wanted in line for line in lines), lines
    editor.page.wait_for_timeout(2000)
    screenshot(editor, "feedback")
    assert "CPU reference" not in json.dumps(editor.export()[0])  # a saved workflow holds no line

"""Example workflows on a running server, those of today and those that a release has brought: all are valid, and run,
but of saved prompts one for each set of inputs that they give to this pack.

saved/VERSION/ holds the workflows and prompts of a release as they were, and saved/0.2.0.dev/ those of the last version
without presets. Users have such files: never change them.
"""
import json
from pathlib import Path

import checkpoints
import comfy_server
import pytest
from test_server import cpu_option

HOST = Path(__file__).parent
PROMPTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (HOST / "prompts").glob("*.json")}
SAVED = {f"{path.parents[1].name}/{path.stem}": json.loads(path.read_text(encoding="utf-8"))
         for path in (HOST / "saved").glob("*/prompts/*.json")}
WORKFLOWS = comfy_server.REPOSITORY / "workflows"
# A tiny checkpoint takes the place of the file that the workflow names; test_demo.py runs the one that names none.
FAMILY = {"minimax_h3_text_to_video": "minimax_h3", "wan2.1_text_to_video": "wan", "wan2.2_text_to_video": "wan",
          "wan2.2_image_to_video": "wan_image",
          "compare_dense_and_sparse": "wan", "tune_and_save": "wan", "mochi_text_to_video": "mochi",
          "hunyuan_video_1.5_text_to_video": "hunyuan_video_1.5", "ltx_video_text_to_video": "ltxv",
          "flux_dev_text_to_image": "flux", "flux_kontext_edit_image": "flux", "sd3.5_text_to_image": "sd3.5",
          "qwen_image_text_to_image": "qwen_image", "sdxl_text_to_image": "sdxl"}
CLIP, IMAGE = {"width": 256, "height": 256, "length": 9}, {"width": 384, "height": 384}
SIZES = {"EmptyHunyuanLatentVideo": CLIP, "EmptyHunyuanVideo15Latent": CLIP, "WanImageToVideo": CLIP,
         "EmptyMochiLatentVideo": {**CLIP, "length": 13}, "EmptyLTXVLatentVideo": {"width": 512, "height": 512,
                                                                                   "length": 17},
         "EmptySD3LatentImage": IMAGE, "EmptyLatentImage": {"width": 256, "height": 256}}
DECODING = {"VAEDecode", "VAEDecodeAudio", "CreateVideo", "SaveVideo", "SaveImage"}


def inputs_of_pack(prompt):
    """The nodes of this pack in a prompt and their inputs, but for file names; of numbers and links the kind alone."""
    return {(node["class_type"], frozenset((name, value if isinstance(value, str | bool) else type(value))
                                           for name, value in node["inputs"].items() if "name" not in name))
            for node in prompt.values() if "SpargeAttn" in node["class_type"]}


# Of the saved prompts, one for each set of inputs that they give to the nodes of this pack.
RUN = dict(PROMPTS)
for name, prompt in sorted(SAVED.items()):
    if inputs_of_pack(prompt) not in map(inputs_of_pack, RUN.values()):
        RUN[name] = prompt


def family_of(name):
    """The tiny checkpoint for a prompt of today or a saved one, None for the demo's."""
    return FAMILY.get(name.split("/")[-1])


@pytest.fixture(scope="module")
def server(comfy_nodes, tmp_path_factory):
    base = tmp_path_factory.mktemp("workflows")
    comfy_server.prepare(base, models=comfy_server.needed_models())
    for pack in ("random_conditioning", "small_models"):
        (base / "custom_nodes" / pack).symlink_to(HOST / pack)
    for family in set(FAMILY.values()):
        checkpoints.write(checkpoints.FAMILIES[family], base / f"models/diffusion_models/tiny_{family}.safetensors")
        if family in checkpoints.VAES:
            checkpoints.write_vae(family, base / f"models/vae/tiny_{family}.safetensors")
    with comfy_server.running(base, "--disable-dynamic-vram", "--fp32-vae", *cpu_option()) as running:
        yield running


def test_every_workflow_has_its_files():
    assert PROMPTS.keys() == FAMILY.keys() | {"demo_without_download"}
    names = {path.stem for path in WORKFLOWS.glob("*.json")}
    assert names == PROMPTS.keys() == {path.stem for path in WORKFLOWS.glob("*.jpg")} and len(names) >= 12


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_workflow_and_prompt_have_the_same_nodes(name):
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    assert {str(node["id"]): node["type"] for node in workflow["nodes"] if node not in notes} == \
        {key: node["class_type"] for key, node in PROMPTS[name].items()}
    models = {model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", ())}
    assert (models or name not in FAMILY) and all(model in notes[0]["widgets_values"][0] for model in models)


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_workflow_opens_readable(name):
    """In a window of 1600×1000 the editor opens it at a scale that draws text, and every node has a group."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    groups = [group["bounding"] for group in workflow["groups"]]
    assert len(groups) >= 3 and all(group["title"] for group in workflow["groups"])
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        assert any(left <= x and top <= y and x + width <= left + wide and y + height <= top + tall
                   for left, top, wide, tall in groups), node["type"]
    assert max(x + width for x, _, width, _ in groups) - min(group[0] for group in groups) <= 2100
    assert max(y + height for _, y, _, height in groups) - min(group[1] for group in groups) <= 1340


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_only_core_nodes_and_this_packs(server, name):
    info = server.get("/object_info")
    for node in PROMPTS[name].values():
        module = info[node["class_type"]]["python_module"]
        assert module == "nodes" or module.startswith(("comfy_extras.", "custom_nodes.spargeattn-nodes")), module


@pytest.mark.parametrize("name", sorted(filter(family_of, PROMPTS | SAVED)))
def test_server_takes_the_prompt(server, name):
    answer = server.get("/prompt", {"prompt": (PROMPTS | SAVED)[name]})
    assert answer["node_errors"] == {}  # it is queued, and ends at the first empty file


def widget_names(node, values):
    """Names of a node's widgets in the editor's order; those of a dynamic combo are the ones of its saved option."""
    for name, spec in (node["input"]["required"] | node["input"].get("optional", {})).items():
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        if kind == "COMFY_DYNAMICCOMBO_V3":
            yield name
            [option] = [option for option in options["options"] if option["key"] == values[name]]
            yield from (f"{name}.{inner}" for group in option["inputs"].values() for inner in group)
        elif isinstance(kind, list) or kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
            yield name
            if options.get("control_after_generate"):
                yield "control_after_generate"


@pytest.mark.parametrize("name", sorted(SAVED))
def test_saved_values_fall_on_their_widgets(server, name):
    """A workflow stores values by position; the prompt that was exported with it has them by name."""
    info, (version, stem) = server.get("/object_info"), name.split("/")
    workflow = json.loads((HOST / f"saved/{version}/workflows/{stem}.json").read_text(encoding="utf-8"))
    own = [node for node in workflow["nodes"] if "SpargeAttn" in node["type"]]
    assert own
    for node in own:
        inputs = SAVED[name][str(node["id"])]["inputs"]
        values = dict(zip(widget_names(info[node["type"]], inputs), node.get("widgets_values", ())))
        values.pop("control_after_generate", None)  # the editor's own
        assert values == {key: value for key, value in inputs.items() if not isinstance(value, list)}


def shrunk(prompt, family):
    """The same graph around a tiny checkpoint: random conditions, small latents, few steps.

    It ends in pictures and clips where the family has a tiny VAE, and in latents elsewhere.
    """
    decoded = family in checkpoints.VAES
    file, family = f"tiny_{family}.safetensors", checkpoints.FAMILIES[family]
    vae = {"class_type": "VAELoader", "inputs": {"vae_name": file}}
    kept = {}
    for key, node in json.loads(json.dumps(prompt)).items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("CLIPLoader", "DualCLIPLoader") or (kind in DECODING | {"VAELoader"} and not decoded):
            continue
        if kind in ("UNETLoader", "CheckpointLoaderSimple"):
            node = {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}
            if kind == "CheckpointLoaderSimple" and decoded:
                kept[f"{key}_vae"] = vae
        elif kind == "VAELoader":
            node = vae
        elif kind == "CLIPTextEncode":
            length, width = family.context
            node = {"class_type": "RandomConditioning",
                    "inputs": {"length": length, "width": width, "seed": int(key), "pooled": family.pooled or 0,
                               "masked": family.text_mask}}
        elif kind == "MiniMaxH3ImageToVideo":
            length, width = family.context
            node = {"class_type": "RandomConditioning",
                    "inputs": {"length": length, "width": width, "seed": int(key), "pooled": 0, "masked": False}}
            kept[f"{key}_latent"] = {"class_type": "EmptyMiniMaxH3LatentAV",
                                     "inputs": {"width": 512, "height": 512, "length": 5}}
        elif kind == "FluxKontextImageScale":
            node = {"class_type": "ImageScale",
                    "inputs": {**inputs, **IMAGE, "upscale_method": "area", "crop": "center"}}
        elif kind == "ApplySpargeAttn":
            first, _, _ = inputs["dense_blocks"].partition(",")  # a tiny model has two blocks
            inputs |= {"min_tokens": checkpoints.MIN_TOKENS, "dense_blocks": first}
        elif kind == "SpargeAttnTune":
            inputs |= {"min_tokens": checkpoints.MIN_TOKENS, "steps": 4, "sampled_steps": 1, "evaluate": False}
        elif kind == "KSamplerAdvanced":
            inputs |= {"steps": 4, "start_at_step": min(2, inputs["start_at_step"])}
            inputs["end_at_step"] = 2 if inputs["start_at_step"] == 0 else 10000
        elif "steps" in inputs:
            inputs["steps"] = 4
        inputs |= SIZES.get(kind, {})
        if "vae" in inputs and inputs["vae"][1] == 2:  # of a checkpoint that holds all models
            inputs["vae"] = [f"{inputs['vae'][0]}_vae", 0]
        kept[key] = node
        if kind == "SpargeAttnReport":
            samples = [key, 0]
            if family.audio:
                samples = [f"video_{key}", 0]
                kept[f"video_{key}"] = {"class_type": "LTXVSeparateAVLatent", "inputs": {"av_latent": [key, 0]}}
            kept[f"save_{key}"] = {"class_type": "SaveLatent",
                                   "inputs": {"samples": samples, "filename_prefix": "latent"}}
    for node in kept.values():
        for name, value in node["inputs"].items():  # to a latent that a node of the prompt made beside the condition
            if isinstance(value, list) and f"{value[0]}_latent" in kept and value[1] == 1:
                node["inputs"][name] = [f"{value[0]}_latent", 0]
    return kept


@pytest.mark.parametrize("name", sorted(filter(family_of, RUN)))
def test_workflow_runs(server, name):
    family = family_of(name)
    prompt = shrunk(RUN[name], family)
    entry, errors = server.run(prompt)
    assert not errors and entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    saved = {node["class_type"] for key, node in prompt.items() if entry["outputs"].get(key, {}).get("images")}
    assert family not in checkpoints.VAES or saved & {"SaveImage", "SaveVideo"}
    reports = [key for key, node in prompt.items() if node["class_type"] == "SpargeAttnReport"]
    assert reports
    for key in reports:
        output = entry["outputs"][key]
        # A model of random weights is tuned to stay dense.
        expected = "tuned: " if name.endswith("tune_and_save") else "of the attention skipped"
        assert output["images"] and expected in output["text"][0], output["text"]
        assert entry["outputs"][f"save_{key}"]["latents"]

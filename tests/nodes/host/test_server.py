"""Prompts with the node on a running server."""
import asyncio
import json
from pathlib import Path

import aiohttp
import checkpoints
import comfy_host
import comfy_server
import pytest
import torch
from safetensors.torch import load_file
from sampling import relative_l1

BINARY, TEXT_EVENT = aiohttp.WSMsgType.BINARY, 3


@pytest.fixture(scope="module")
def server(comfy_nodes, tmp_path_factory):  # comfy_nodes: the checkpoint is written with ComfyUI's model class
    base = tmp_path_factory.mktemp("server")
    comfy_host.prepare_base_directory(base, Path(__file__).parent / "random_conditioning")
    checkpoints.write(checkpoints.FAMILIES["wan"], base / "models/diffusion_models/tiny_wan.safetensors")
    with comfy_server.running(base, "--disable-dynamic-vram", *cpu_option()) as running:
        yield running


def cpu_option():
    return () if torch.cuda.is_available() else ("--cpu",)


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def prompt(**widgets):
    """Two branches from one loader: `plain` samples the model as loaded, `sparse` with Apply SpargeAttn."""
    sampling = {"seed": 7, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
                "positive": ["condition", 0], "negative": ["condition", 0], "latent_image": ["latent", 0]}
    widgets = {"selection": "cdf", "selection.cdf_threshold": 0.98, "selection.similarity_threshold": 0.6,
               "pv_threshold": 50.0, "start_percent": 0.0, "end_percent": 1.0,
               "skipped_blocks": "drop", "pv_precision": "auto", "dense_blocks": "", "min_tokens": 512,
               "verbose": False, **widgets}
    return {
        "loader": node("UNETLoader", unet_name="tiny_wan.safetensors", weight_dtype="default"),
        "condition": node("RandomConditioning", length=48, width=64, seed=1),
        "latent": node("EmptyHunyuanLatentVideo", width=256, height=256, length=9, batch_size=1),
        "patch": node("ApplySpargeAttn", model=["loader", 0], **widgets),
        "plain": node("KSampler", model=["loader", 0], **sampling),
        "sparse": node("KSampler", model=["patch", 0], **sampling),
        "save_plain": node("SaveLatent", samples=["plain", 0], filename_prefix="plain"),
        "save_sparse": node("SaveLatent", samples=["sparse", 0], filename_prefix="sparse"),
    }


def saved_latent(server, entry, name):
    """The latent that SaveLatent node `name` wrote, as the history reports it."""
    output = entry["outputs"][name]["latents"][0]
    return load_file(server.base / "output" / output["subfolder"] / output["filename"])["latent_tensor"]


def test_object_info(server):
    info = server.get("/object_info/ApplySpargeAttn")["ApplySpargeAttn"]
    assert info["display_name"] == "Apply SpargeAttn"
    assert info["output"] == ["MODEL"]
    assert info["input_order"]["required"] == ["model"]
    assert {"selection", "start_percent", "preset"} <= info["input"]["optional"].keys()


def test_prompt_with_the_node_finishes(server):
    entry, errors = server.run(prompt())
    assert not errors and entry["status"]["status_str"] == "success", entry["status"]
    plain, sparse = (saved_latent(server, entry, f"save_{name}") for name in ("plain", "sparse"))
    assert plain.shape == sparse.shape == (1, 16, 3, 32, 32)
    assert relative_l1(sparse, plain) <= 0.02
    # Two blocks, three steps.
    assert "SpargeAttn: 6 attention calls sparse" in server.log(), server.log()[-4000:]


def test_line_on_the_node(server):
    """What a browser is told about the node Apply SpargeAttn, while it samples and afterwards."""
    async def lines(graph):
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=me") as socket:
            queued = await asyncio.to_thread(server.get, "/prompt", {"prompt": graph, "client_id": "me"})
            await asyncio.to_thread(server.finished, queued["prompt_id"])
            while True:
                try:
                    message = await socket.receive(timeout=2)
                except asyncio.TimeoutError:
                    return
                if message.type == BINARY and int.from_bytes(message.data[:4], "big") == TEXT_EVENT:
                    end = 8 + int.from_bytes(message.data[4:8], "big")
                    shown.append((message.data[8:end].decode(), message.data[end:].decode()))

    low = {"selection.cdf_threshold": 0.5, "selection.similarity_threshold": -1.0}
    skipped = "step 1 · sparse attention calls: 1", "% skipped · CPU reference"
    reason = "fewer tokens than min_tokens ("
    short = f"step 1 · nothing sparse yet: {reason}", f"nothing sparse: {reason}"
    # The last prompt has an equal node in another place, whose output must not come from the cache.
    for name, widgets, (first, last) in (("patch", low, skipped), ("12:3", {"min_tokens": 4096}, short),
                                         ("12:4", {"min_tokens": 4096}, short)):
        shown, graph = [], prompt(**widgets)
        graph[name] = graph.pop("patch")
        graph["sparse"]["inputs"]["model"] = [name, 0]
        asyncio.run(lines(graph))
        assert {node_id for node_id, _ in shown} == {name}
        assert shown[0][1].startswith(first) and last in shown[-1][1], shown


def test_fast_kernels_are_told_when_the_pack_loads(server):
    assert server.log().count("SpargeAttn: no fast kernels here: ") + server.log().count("fast kernels: Triton") == 1


def test_report_of_a_model_that_this_prompt_did_not_sample(server):
    """Sampled in one prompt; in the next the sampler's input is the loader again, and Apply's output is cached."""
    def queue(model, seed, head=0):
        graph = prompt(**{"selection.cdf_threshold": 0.5, "selection.similarity_threshold": -1.0, "verbose": True})
        graph["sparse"]["inputs"] |= {"model": [model, 0], "seed": seed}
        graph["report"] = node("SpargeAttnReport", model=["patch", 0], samples=["sparse", 0], block="", head=head,
                               step=0, theme="dark")
        graph = {name: graph[name] for name in ("loader", "condition", "latent", "patch", "sparse", "report")}
        entry, errors = server.run(graph)
        assert not errors and entry["status"]["status_str"] == "success", entry["status"]
        return entry["outputs"]["report"]["text"][0]

    own, other_head, raw, again = queue("patch", 1), queue("patch", 1, head=1), queue("loader", 2), queue("patch", 3)
    told = ["not sampled in this prompt" in text for text in (own, other_head, raw, again)]
    assert told == [False, True, True, False]
    assert "of the attention skipped" in own and set(own.splitlines()) < set(other_head.splitlines())


def test_run_that_skips_little_is_called_so_in_the_log(server):
    _, errors = server.run(prompt(**{"selection.cdf_threshold": 1.0}))
    assert not errors
    assert "None of the attention was skipped. To skip more, lower similarity_threshold (0.6)" in server.log()


def test_bad_widget_value_is_refused_before_anything_runs(server):
    """ComfyUI reports it at the node and runs the branch that does not depend on it."""
    entry, errors = server.run(prompt(dense_blocks="0, x"))
    assert errors.keys() == {"patch"} and "dense_blocks" in json.dumps(errors)
    assert entry["outputs"].keys() == {"save_plain"}

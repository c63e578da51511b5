"""Build the example workflows in ComfyUI's own editor and export them.

This writes the files of workflows/ and the prompts that the tests send to the server. It also runs the example that
needs no download, for the picture of its clips.

    COMFYUI_PATH=... python -m tests.browser.tools.make_workflows [name ...]

Run it after a change of the nodes' inputs or of the examples.
"""
import io
import json
import re
import sys
import tempfile
import uuid
from pathlib import Path

from PIL import Image

from ...nodes.host import comfy_server
from ..editor import Editor, browser
from . import thumbnail
from .example import GROUPS
from .examples import EXAMPLES
from .layout import arrange, node_size

WORKFLOWS = comfy_server.REPOSITORY / "workflows"
PROMPTS = comfy_server.REPOSITORY / "tests/nodes/host/prompts"
DEMO_PICTURE = comfy_server.REPOSITORY / "nodes/web/docs/LoadSpargeAttnDemoModel/demo.jpg"
NOTE = "note"  # key of the note among an example's nodes

# Makes the nodes and their links; returns the size that each node asks for.
BUILD = """async nodes => {
    app.graph.clear()
    const made = window.made = {}
    for (const spec of nodes) {
        const node = LiteGraph.createNode(spec.type)
        if (!node) throw new Error('no node ' + spec.type)
        app.graph.add(node)
        if (spec.title) node.title = spec.title
        for (const [name, value] of Object.entries(spec.widgets)) {
            const widget = node.widgets.find(widget => widget.name === name)
            if (!widget) throw new Error(spec.type + ' has no widget ' + name)
            widget.value = value
            widget.callback?.(value, app.canvas, node)
        }
        const seed = node.widgets?.find(widget => widget.name === 'control_after_generate')
        if (seed) seed.value = 'fixed'
        if (spec.models.length) node.properties.models = spec.models
        made[spec.key] = node
    }
    for (const spec of nodes)
        for (const [input, [source, output]] of Object.entries(spec.links)) {
            const slot = made[spec.key].inputs.findIndex(slot => slot.name === input)
            if (slot < 0 || !made[source].connect(output, made[spec.key], slot))
                throw new Error(`no link from ${source} to ${spec.key}.${input}`)
        }
    await new Promise(resolve => setTimeout(resolve, 300))
    return Object.fromEntries(nodes.map(spec => [spec.key, [...made[spec.key].computeSize()]]))
}"""

# Puts the nodes and the groups (title, colour, box) into their boxes (x, y, width, height).
PLACE = """({places, groups}) => {
    for (const [key, [x, y, width, height]] of Object.entries(places)) {
        made[key].pos = [x, y]
        made[key].size = [width, height]
    }
    for (const [title, color, [x, y, width, height]] of groups) {
        const group = new LiteGraph.LGraphGroup(title)
        app.graph.add(group)
        group.pos = [x, y]
        group.size = [width, height]
        group.color = color
    }
    app.canvas.setDirty(true, true)
}"""


def build(editor, example):
    """Build the example in the editor, the note last; returns its groups: (title, colour, box)."""
    nodes = {**example.nodes, NOTE: {"key": NOTE, "type": "MarkdownNote", "column": 0, "group": GROUPS[0][0],
                                     "links": {}, "widgets": {"text": example.note}, "models": [], "size": None,
                                     "title": "Read me"}}
    computed = editor.run(BUILD, list(nodes.values()))
    first = {NOTE: nodes[NOTE], **example.nodes}  # the note stands above all others
    places, boxes = arrange(first, {key: node_size(node["type"], computed[key], node["size"])
                                    for key, node in nodes.items()})
    groups = [(title, colour, boxes[title]) for title, colour in example.groups.items()]
    editor.run(PLACE, {"places": places, "groups": groups})
    editor.page.wait_for_timeout(500)
    return groups


def make(editor, server, example):
    groups = build(editor, example)
    box = editor.fit()
    workflow, prompt = editor.export()
    workflow |= {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, example.name)), "extra": {}}
    (WORKFLOWS / f"{example.name}.json").write_text(json.dumps(workflow, ensure_ascii=False, indent=1) + "\n")
    (PROMPTS / f"{example.name}.json").write_text(json.dumps(prompt, ensure_ascii=False, indent=1) + "\n")
    if any(node["models"] for node in example.nodes.values()):
        graph = Image.open(io.BytesIO(editor.page.screenshot(clip=box))).convert("RGB")
        picture = thumbnail.of_graph(graph, groups, example)
    else:
        clips = sample(server, prompt)
        clips.save(DEMO_PICTURE, quality=88)
        picture = thumbnail.of_clips(clips, example)
    picture.save(WORKFLOWS / f"{example.name}.jpg", quality=88)


def sample(server, prompt):
    """A picture of the clips that the demo makes."""
    stitch, report = (next(key for key, node in prompt.items() if node["class_type"] == kind)
                      for kind in ("ImageStitch", "SpargeAttnReport"))
    preview = {"class_type": "PreviewImage", "inputs": {"images": [stitch, 0]}}
    outputs = server.run({**prompt, "preview": preview}, 600)[0]["outputs"]
    pictures, text = outputs["preview"]["images"], outputs[report]["text"][0]
    picture = Image.open(server.base / "temp" / pictures[len(pictures) // 2]["filename"])
    skipped = re.search(r"[\d.]+%", text)[0]
    return thumbnail.captioned(picture.convert("RGB"), ("dense", f"SpargeAttn, {skipped} skipped"))


def main(names):
    models = {(model["directory"], model["name"]) for example in EXAMPLES.values()
              for node in example.nodes.values() for model in node["models"]}
    WORKFLOWS.mkdir(exist_ok=True)
    PROMPTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        comfy_server.prepare(Path(base), models=models)
        with comfy_server.running(Path(base), "--cpu") as server, browser() as chromium:
            for name in names or EXAMPLES:
                editor = Editor(chromium, server.url, width=2800, height=1300)
                editor.plain_canvas()
                make(editor, server, EXAMPLES[name])
                editor.context.close()
                print(name)


if __name__ == "__main__":
    main(sys.argv[1:])

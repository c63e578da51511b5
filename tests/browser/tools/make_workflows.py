"""Build the example workflows in ComfyUI's own editor and export them.

This writes the files of workflows/ and the prompts that the tests send to the server.

    COMFYUI_PATH=... python -m tests.browser.tools.make_workflows [name ...]

Run it after a change of the nodes' inputs or of the examples.
"""
import io
import json
import sys
import tempfile
import uuid
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...nodes.host import comfy_server
from ..editor import Editor, browser
from .image_examples import flux_dev, flux_kontext, qwen_image, sd35, sdxl
from .video_examples import (
    compare,
    hunyuan_video,
    ltx_video,
    mochi,
    tune_and_save,
    wan21_text_to_video,
    wan22_image_to_video,
    wan22_text_to_video,
)

WORKFLOWS = comfy_server.REPOSITORY / "workflows"
PROMPTS = comfy_server.REPOSITORY / "tests/nodes/host/prompts"
EXAMPLES = {graph.name: graph for graph in (make() for make in (
    wan21_text_to_video, wan22_text_to_video, wan22_image_to_video, hunyuan_video, mochi, ltx_video, flux_dev,
    flux_kontext, sd35, qwen_image, sdxl, compare, tune_and_save))}

BUILD = """async ({nodes, note}) => {
    app.graph.clear()
    const made = {}
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
    const text = LiteGraph.createNode('MarkdownNote')
    app.graph.add(text)
    text.title = 'Read me'
    text.widgets[0].value = note
    text.pos = [0, 0]
    text.size = [460, 420]
    const columns = []
    for (const spec of nodes) (columns[spec.column] ??= []).push(made[spec.key])
    let x = 500
    for (const column of columns.filter(Boolean)) {
        let y = 0, wide = 0
        for (const node of column) {
            const [least, tall] = node.computeSize()
            node.size = [Math.max(least, {CLIPTextEncode: 340, ApplySpargeAttn: 340, SpargeAttnReport: 340}[node.type]
                                         ?? 300), Math.max(tall, node.type === 'CLIPTextEncode' ? 150 : 0,
                                         node.type === 'SpargeAttnReport' ? 560 : 0)]
            node.pos = [x, y]
            y += node.size[1] + 70
            wide = Math.max(wide, node.size[0])
        }
        x += wide + 60
    }
    app.canvas.setDirty(true, true)
}"""


def make(editor, example):
    editor.run(BUILD, {"nodes": list(example.nodes.values()), "note": example.note})
    editor.page.wait_for_timeout(500)
    box = editor.fit()
    workflow, prompt = editor.export()
    workflow |= {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, example.name)), "extra": {}}
    (WORKFLOWS / f"{example.name}.json").write_text(json.dumps(workflow, ensure_ascii=False, indent=1) + "\n")
    (PROMPTS / f"{example.name}.json").write_text(json.dumps(prompt, ensure_ascii=False, indent=1) + "\n")
    graph = Image.open(io.BytesIO(editor.page.screenshot(clip=box))).convert("RGB")
    thumbnail(graph, example.title).save(WORKFLOWS / f"{example.name}.jpg", quality=88)


def thumbnail(graph, title):
    """The graph over its title, 16:9."""
    width, height, band = 960, 540, 150
    page = Image.new("RGB", (width, height), (20, 22, 27))
    graph.thumbnail((width - 40, height - band - 30), Image.Resampling.LANCZOS)
    page.paste(graph, ((width - graph.width) // 2, (height - band - graph.height) // 2))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, height - band, width, height), fill=(36, 158, 137))
    model, _, rest = title.partition(" with ")
    draw.text((30, height - band + 18), model, font=ImageFont.load_default(50), fill="white")
    draw.text((30, height - band + 86), rest or "SpargeAttn", font=ImageFont.load_default(36), fill="white")
    return page


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
                make(editor, EXAMPLES[name])
                editor.context.close()
                print(name)


if __name__ == "__main__":
    main(sys.argv[1:])

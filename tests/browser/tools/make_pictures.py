"""Make the pictures of graphs on the help pages: photograph the nodes in ComfyUI's own editor.

    COMFYUI_PATH=... python -m tests.browser.tools.make_pictures

Run it after a change of the nodes' inputs. Pictures have few colours, which keeps the archive small.
"""
import io
import tempfile
from pathlib import Path

from PIL import Image

from ...nodes.host import comfy_server
from ..editor import Editor, browser

DOCS = comfy_server.REPOSITORY / "nodes/web/docs"
MODEL, PARAMS = "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1_1.3b_480p.safetensors"
MODELS = ("diffusion_models", MODEL), ("sparge_params", PARAMS)
WIDE = 310  # width of a node in pixels
# (type, column, {widget: value}) each, and (from, output, to, input) by their places in that list.
PICTURES = {
    "ApplySpargeAttn/apply.png": (
        [("UNETLoader", 0, {}), ("ApplySpargeAttn", 1, {"selection.cdf_threshold": 0.98}),
         ("KSampler", 2, {"steps": 30, "cfg": 6.0}), ("SpargeAttnReport", 3, {})],
        [(0, 0, 1, "model"), (1, 0, 2, "model"), (1, 0, 3, "model"), (2, 0, 3, "samples")]),
    "SpargeAttnTune/tune.png": (
        [("UNETLoader", 0, {}), ("SpargeAttnTune", 1, {"steps": 30, "cfg": 6.0}),
         ("SpargeAttnSaveParams", 2, {"filename": "wan2.1_1.3b_480p"}), ("PreviewImage", 2, {})],
        [(0, 0, 1, "model"), (1, 0, 2, "params"), (1, 2, 3, "images")]),
    "SpargeAttnLoadParams/load.png": (
        [("UNETLoader", 0, {}), ("SpargeAttnLoadParams", 0, {}), ("ApplySpargeAttn", 1, {}),
         ("KSampler", 2, {"steps": 30, "cfg": 6.0})],
        [(0, 0, 2, "model"), (1, 0, 2, "params"), (2, 0, 3, "model")]),
}

BUILD = """({nodes, links, wide}) => {
    app.graph.clear()
    const below = []
    const made = nodes.map(([type, column, widgets]) => {
        const node = LiteGraph.createNode(type)
        app.graph.add(node)
        for (const [name, value] of Object.entries(widgets)) {
            const widget = node.widgets.find(widget => widget.name === name)
            widget.value = value
            widget.callback?.(value, app.canvas, node)
        }
        node.pos = [column * (wide + 60), below[column] ?? 0]
        node.size = [wide, node.computeSize()[1]]
        below[column] = node.pos[1] + node.size[1] + 60
        return node
    })
    for (const [from, output, to, input] of links)
        made[from].connect(output, made[to], made[to].inputs.findIndex(slot => slot.name === input))
    app.canvas.deselectAll()
}"""


def main():
    with tempfile.TemporaryDirectory() as base:
        comfy_server.prepare(Path(base), models=MODELS)
        with comfy_server.running(Path(base), "--cpu") as server, browser() as chromium:
            editor = Editor(chromium, server.url, width=1560, height=1000)
            editor.plain_canvas()
            for name, (nodes, links) in PICTURES.items():
                editor.run(BUILD, {"nodes": nodes, "links": links, "wide": WIDE})
                box = editor.fit()
                editor.page.mouse.move(5, 500)
                editor.page.wait_for_timeout(500)
                picture = Image.open(io.BytesIO(editor.page.screenshot(clip=box))).convert("RGB")
                picture.quantize(128).save(DOCS / name, optimize=True)
                print(name, picture.size)


if __name__ == "__main__":
    main()

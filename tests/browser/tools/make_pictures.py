"""Make the pictures of graphs on the help pages: photograph the nodes in ComfyUI's own editor.

    COMFYUI_PATH=... python -m tests.browser.tools.make_pictures

Run it after a change of the nodes' inputs. A help page opens 280 pixels wide: the nodes of a picture stand below each
other, so that they can be read there. Pictures have few colours, which keeps the archive small.
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
WIDE = 280  # width of a node in pixels
DENSITY = 2  # pixels of a picture in one of the editor
# (type, {widget: value}) each, from the top down, and (from, output, to, input) by their places in that list.
PICTURES = {
    "ApplySpargeAttn/apply.png": (
        [("UNETLoader", {}), ("ApplySpargeAttn", {})],
        [(0, 0, 1, "model")]),
    "SpargeAttnTune/tune.png": (
        [("SpargeAttnTune", {"steps": 30, "cfg": 6.0}), ("SpargeAttnSaveParams", {"filename": "wan2.1_1.3b_480p"})],
        [(0, 0, 1, "params")]),
    "SpargeAttnLoadParams/load.png": (
        [("SpargeAttnLoadParams", {}), ("ApplySpargeAttn", {})],
        [(0, 0, 1, "params")]),
    "SpargeAttnBenchmark/benchmark.png": ([("SpargeAttnBenchmark", {})], []),
}
RUN = {"SpargeAttnBenchmark/benchmark.png"}  # photographed after a run on the CPU, with the picture that it shows

BUILD = """({nodes, links, wide}) => {
    app.graph.clear()
    let below = 0
    const made = nodes.map(([type, widgets]) => {
        const node = LiteGraph.createNode(type)
        app.graph.add(node)
        for (const [name, value] of Object.entries(widgets)) {
            const widget = node.widgets.find(widget => widget.name === name)
            widget.value = value
            widget.callback?.(value, app.canvas, node)
        }
        node.pos = [0, below]
        node.size = [wide, node.computeSize()[1]]
        below += node.size[1] + 60
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
            editor = Editor(chromium, server.url, width=1000, height=1100, density=DENSITY)
            editor.plain_canvas()
            for name, (nodes, links) in PICTURES.items():
                editor.run(BUILD, {"nodes": nodes, "links": links, "wide": WIDE})
                if name in RUN:
                    editor.run("() => app.queuePrompt(0)")
                    editor.page.wait_for_function("app.graph._nodes[0].imgs?.length")
                    editor.run("() => app.graph._nodes[0].setSize([440, 640])")
                box = editor.fit()
                editor.page.mouse.move(5, 500)
                editor.page.wait_for_timeout(500)
                picture = Image.open(io.BytesIO(editor.page.screenshot(clip=box))).convert("RGB")
                picture.quantize(256).save(DOCS / name, optimize=True)
                print(name, picture.size)


if __name__ == "__main__":
    main()

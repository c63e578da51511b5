"""ComfyUI's editor in a headless Chromium."""
import json
import shutil
from contextlib import contextmanager

from playwright.sync_api import TimeoutError, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds


@contextmanager
def browser():
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield running
        finally:
            running.close()


class Editor:
    """The editor at `url` in a page of its own; `errors` collects what its console reports as an error.

    blocked: pattern of addresses that it can't load.
    """

    def __init__(self, browser, url, locale="en", width=1600, height=1000, density=1, blocked=None):
        self.context = browser.new_context(viewport={"width": width, "height": height}, locale=locale,
                                           device_scale_factor=density)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(
            f"{message.text} {message.location.get('url', '')}"))
        self.page.route("**/*", self._stay_local)
        if blocked:
            self.page.route(blocked, lambda route: route.abort())
        self.url = url
        self.page.goto(url)
        self.wait_until_ready()

    def wait_until_ready(self):
        self.page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types?.ApplySpargeAttn)")
        # Dialogs that greet a new user cover the canvas.
        self.page.wait_for_timeout(1500)
        self.close_dialogs()

    def _stay_local(self, route):
        return route.continue_() if route.request.url.startswith((self.url, "data:", "blob:")) else route.abort()

    def close_dialogs(self):
        for _ in range(3):
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(150)

    def run(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def setting(self, name, value):
        self.run("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def clear(self):
        """Remove all nodes. In a graph without an id, new ones would take the values of earlier ones."""
        self.run("() => { app.graph.clear(); app.graph.id = crypto.randomUUID() }")

    def export(self):
        """(workflow, prompt) of the graph, as the menu's Export and Export (API) give them."""
        return json.loads(self.run("async () => { const { workflow, output } = await app.graphToPrompt();"
                                   "return JSON.stringify([workflow, output]) }"))

    def fit(self):
        """Scale the canvas so that the whole graph shows beside the menus; returns its box on the page in pixels."""
        box = self.run("""() => {
            const ds = app.canvas.ds, title = 40, margin = 20
            const boxes = [...app.graph._nodes.map(n => [n.pos[0], n.pos[1] - title, ...n.size, title]),
                           ...app.graph._groups.map(g => [...g.pos, ...g.size, 0])]
            const left = Math.min(...boxes.map(([x]) => x)) - margin
            const top = Math.min(...boxes.map(([, y]) => y)) - margin
            const right = Math.max(...boxes.map(([x, , width]) => x + width)) + margin
            const bottom = Math.max(...boxes.map(([, y, , height, above]) => y + above + height)) + margin
            const page = app.canvas.canvas.getBoundingClientRect(), menus = 90
            ds.scale = Math.min(1, (page.width - menus - 20) / (right - left),
                                (page.height - menus - 60) / (bottom - top))
            ds.offset = [menus / ds.scale - left, menus / ds.scale - top]
            app.canvas.setDirty(true, true)
            return {x: page.x + menus, y: page.y + menus, width: ds.scale * (right - left),
                    height: ds.scale * (bottom - top)}
        }""")
        self.page.wait_for_timeout(500)
        return box

    def plain_canvas(self):
        """For screenshots: remove overlays from the canvas and draw text at every scale."""
        for name, value in (("Comfy.Minimap.Visible", False), ("Comfy.Graph.CanvasInfo", False),
                            ("Comfy.Graph.CanvasMenu", False), ("LiteGraph.Canvas.MinFontSizeForLOD", 0)):
            self.setting(name, value)

    def search(self, words, wanted):
        """Titles that the node search lists for `words`, best first, once all of `wanted` are among them."""
        box = self.page.get_by_role("combobox", name="Add a node...")
        canvas = self.page.locator("#graph-canvas").bounding_box()
        for _ in range(10):  # a busy editor may miss a double click
            self.page.mouse.dblclick(canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2)
            self.page.wait_for_timeout(1000)
            if box.is_visible():
                break
        box.fill(words)
        titles = "[...document.querySelectorAll('[role=option]')].map(option => option.innerText.split('\\n')[0])"
        try:
            self.page.wait_for_function(f"wanted => wanted.every(title => {titles}.includes(title))", arg=wanted)
        except TimeoutError:
            pass  # the titles that are there now tell a caller more
        return self.run(f"() => {titles}")

    def place(self, node):
        """Put one selected node on an empty canvas; returns its title and the (name, label) of its widgets."""
        self.clear()
        shown = self.run("""type => {
            const node = LiteGraph.createNode(type)
            app.graph.add(node)
            node.pos = [0, 0]
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [300, 250]
            app.canvas.selectNode(node)
            app.canvas.setDirty(true, true)
            return {title: node.title, widgets: (node.widgets ?? []).filter(widget => !widget.name.startsWith('$$'))
                .map(widget => [widget.name, widget.label ?? widget.name])}
        }""", node)
        self.page.wait_for_timeout(700)
        return shown

    def middle(self, widget):
        """Where a widget of the node on the canvas has its middle on the page, (x, y) in pixels."""
        return self.run("""name => {
            const node = app.graph._nodes[0], widget = node.widgets.find(widget => widget.name === name)
            const page = app.canvas.canvas.getBoundingClientRect(), [x, y] = app.canvas.ds.offset
            return [page.x + x + node.size[0] / 2, page.y + y + widget.last_y + 10]
        }""", widget)

    def tooltip(self, node, widget):
        """The tooltip that appears when the mouse rests on a widget."""
        place = self.middle(widget)
        self.page.mouse.move(10, 300)
        self.page.wait_for_timeout(100)
        self.page.mouse.move(place[0] - 3, place[1])
        self.page.mouse.move(*place, steps=3)
        shown = self.page.locator(".node-tooltip")
        shown.wait_for()
        return shown.inner_text()

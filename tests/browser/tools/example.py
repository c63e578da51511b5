"""An example workflow is a list of nodes. make_workflows.py builds it in ComfyUI's editor.

A node is {key, type, column, group, links: {input: [key of another node, output number]}, widgets, models}. A model is
(folder, address). The workflow's note lists the models, and the editor offers to download them.
"""
from dataclasses import dataclass, field

HUB = "https://huggingface.co"
FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
SEED = 42
BLUE, GREEN, YELLOW, GREY = "#3f789e", "#3c8c5c", "#b58b2a", "#777777"
# The group that a node stands in by its column: columns 0 and 1, 2 and 3, 4 and 5.
GROUPS = ("Model and prompt", BLUE), ("SpargeAttn", GREEN), ("Result", YELLOW)


@dataclass
class Example:
    """One workflow: the `name` of its files, the text of its note, and its nodes by key."""

    name: str
    title: str
    about: str
    nodes: dict[str, dict] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)  # colour of each title, in the order of the first node

    def add(self, key, kind, column, links=None, /, *, models=(), title=None, group=None, size=None, **widgets):
        """Add a node; `__` in a widget's name stands for a dot. Returns its first output.

        group: (title, colour) of the one that the node stands in; by default that of its column.
        size: least (width, height), in place of what its type has.
        """
        links = {name: list(source) for name, source in (links or {}).items()}
        widgets = {name.replace("__", "."): value for name, value in widgets.items()}
        group, colour = group or GROUPS[column // 2]
        self.groups.setdefault(group, colour)
        files = [{"name": url.rsplit("/", 1)[1], "url": url, "directory": folder} for folder, url in models]
        self.nodes[key] = {"key": key, "type": kind, "title": title, "column": column, "group": group, "size": size,
                           "links": links, "widgets": widgets, "models": files}
        return key, 0

    @property
    def note(self):
        files = {(model["directory"], model["name"]): model["url"] for node in self.nodes.values()
                 for model in node["models"]}
        lines = [f"## {self.title}", "", self.about]
        if files:
            lines += ["", "**Files**", ""]
            lines += [f"- [{name}]({url}) → `models/{folder}`" for (folder, name), url in sorted(files.items())]
        lines += ["", "Bypass **Apply SpargeAttn** (Ctrl+B) and run again with the same seed to compare. **SpargeAttn "
                      "Report** shows what was skipped, and why calls stayed dense."]
        return "\n".join(lines)

    # Parts that several examples share; each returns outputs as (key, number).

    def diffusion_model(self, url, key="model"):
        return self.add(key, "UNETLoader", 0, models=[("diffusion_models", url)], unet_name=url.rsplit("/", 1)[1])

    def text_encoder(self, kind, *urls):
        names = [url.rsplit("/", 1)[1] for url in urls]
        models = [("text_encoders", url) for url in urls]
        if len(urls) == 1:
            return self.add("clip", "CLIPLoader", 0, models=models, clip_name=names[0], type=kind)
        return self.add("clip", "DualCLIPLoader", 0, models=models, clip_name1=names[0], clip_name2=names[1], type=kind)

    def vae(self, url, key="vae"):
        return self.add(key, "VAELoader", 0, models=[("vae", url)], vae_name=url.rsplit("/", 1)[1])

    def checkpoint(self, url):
        self.add("checkpoint", "CheckpointLoaderSimple", 0, models=[("checkpoints", url)],
                 ckpt_name=url.rsplit("/", 1)[1])
        return [("checkpoint", output) for output in range(3)]

    def prompts(self, clip, positive, negative=""):
        return (self.add("positive", "CLIPTextEncode", 1, {"clip": clip}, title="Prompt", text=positive),
                self.add("negative", "CLIPTextEncode", 1, {"clip": clip}, title="Negative prompt", text=negative))

    def sparge(self, model, key="sparge", column=2, **widgets):
        return self.add(key, "ApplySpargeAttn", column, {"model": model}, **widgets)

    def sample(self, model, positive, negative, latent, key="sampler", column=2, title=None, **widgets):
        widgets = {"seed": SEED, "sampler_name": "euler", "scheduler": "simple", **widgets}
        return self.add(key, "KSampler", column, {"model": model, "positive": positive, "negative": negative,
                                                  "latent_image": latent}, title=title, **widgets)

    def report(self, model, latent, block="", **place):
        """Its output is the sampler's latent, so that nodes after it need no second link to the sampler.

        block: whose block map is shown: one from the middle of the model, since the first ones skip little or nothing.
        """
        return self.add("report", "SpargeAttnReport", 4, {"model": model, "samples": latent}, block=block, **place)

    def decode(self, latent, vae, key="decode", column=5, **place):
        return self.add(key, "VAEDecode", column, {"samples": latent, "vae": vae}, **place)

    def save_video(self, images, fps, column=5, sound=None, **place):
        links = {"images": images} | ({"audio": sound} if sound else {})
        video = self.add("video", "CreateVideo", column, links, fps=fps)
        self.add("save", "SaveVideo", column, {"video": video}, filename_prefix=f"video/{self.name}", **place)

    def save_image(self, images):
        self.add("save", "SaveImage", 5, {"images": images}, filename_prefix=self.name)

"""An example workflow is a list of nodes. make_workflows.py builds it in ComfyUI's editor.

A node is {key, type, column, links: {input: [key of another node, output number]}, widgets, models}. A model is
(folder, address). The workflow's note lists the models, and the editor offers to download them.
"""
from dataclasses import dataclass, field

HUB = "https://huggingface.co"
FLUX_TEXT = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"
SEED = 42


@dataclass
class Example:
    """One workflow: the `name` of its files, the text of its note, and its nodes by key."""

    name: str
    title: str
    about: str
    nodes: dict[str, dict] = field(default_factory=dict)

    def add(self, key, kind, column, links=None, /, *, models=(), title=None, **widgets):
        """Add a node; `__` in a widget's name stands for a dot. Returns its first output."""
        links = {name: list(source) for name, source in (links or {}).items()}
        widgets = {name.replace("__", "."): value for name, value in widgets.items()}
        self.nodes[key] = {"key": key, "type": kind, "column": column, "links": links, "widgets": widgets,
                           "models": [{"name": url.rsplit("/", 1)[1], "url": url, "directory": folder}
                                      for folder, url in models], "title": title}
        return key, 0

    @property
    def note(self):
        files = {(model["directory"], model["name"]): model["url"] for node in self.nodes.values()
                 for model in node["models"]}
        lines = [f"## {self.title}", "", self.about, "", "**Files**", ""]
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

    def vae(self, url):
        return self.add("vae", "VAELoader", 0, models=[("vae", url)], vae_name=url.rsplit("/", 1)[1])

    def checkpoint(self, url):
        self.add("checkpoint", "CheckpointLoaderSimple", 0, models=[("checkpoints", url)],
                 ckpt_name=url.rsplit("/", 1)[1])
        return [("checkpoint", output) for output in range(3)]

    def prompts(self, clip, positive, negative=""):
        return (self.add("positive", "CLIPTextEncode", 1, {"clip": clip}, title="Prompt", text=positive),
                self.add("negative", "CLIPTextEncode", 1, {"clip": clip}, title="Negative prompt", text=negative))

    def sparge(self, model, key="sparge", **widgets):
        return self.add(key, "ApplySpargeAttn", 2, {"model": model}, **widgets)

    def sample(self, model, positive, negative, latent, key="sampler", title=None, **widgets):
        widgets = {"seed": SEED, "sampler_name": "euler", "scheduler": "simple", **widgets}
        return self.add(key, "KSampler", 3, {"model": model, "positive": positive, "negative": negative,
                                             "latent_image": latent}, title=title, **widgets)

    def report(self, model, latent, key="report"):
        """Its output is the sampler's latent, so that nodes after it need no second link to the sampler."""
        return self.add(key, "SpargeAttnReport", 4, {"model": model, "samples": latent})

    def decode(self, latent, vae, key="decode"):
        return self.add(key, "VAEDecode", 5, {"samples": latent, "vae": vae})

    def save_video(self, images, fps):
        video = self.add("video", "CreateVideo", 5, {"images": images}, fps=fps)
        self.add("save", "SaveVideo", 6, {"video": video}, filename_prefix=f"video/{self.name}")

    def save_image(self, images):
        self.add("save", "SaveImage", 6, {"images": images}, filename_prefix=self.name)

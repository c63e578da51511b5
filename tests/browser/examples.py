"""The example workflows, as lists of nodes; make_workflows.py builds them in ComfyUI's editor.

A node is {key, type, column, links: {input: [key of another node, output number]}, widgets, models}. Models are
(folder, address) and become the note on files to download, which the editor also offers to download.
"""
from dataclasses import dataclass, field

_HUB = "https://huggingface.co"
WAN21 = f"{_HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{_HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN = f"{_HUB}/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
FLUX_TEXT = f"{_HUB}/comfyanonymous/flux_text_encoders/resolve/main"
QWEN = f"{_HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
MOCHI = f"{_HUB}/Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
FLUX_VAE = f"{_HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"
SEED = 42
VIDEO = {"selection.cdf_threshold": 0.98, "hilbert": "on"}
IMAGE = {"selection.cdf_threshold": 0.98}
PROMPT = "A red fox trots through fresh snow between tall pines, low winter sun, the camera follows at its side"
PICTURE = "A wooden boat on a still mountain lake at dawn, mist over the water, detailed photograph"


@dataclass
class Example:
    """One workflow: `name` of its files, what its note says, and its nodes by key."""

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
        """Ends in the sampler's latent, so that whatever follows it needs no second link to the sampler."""
        return self.add(key, "SpargeAttnReport", 4, {"model": model, "samples": latent})

    def decode(self, latent, vae, key="decode"):
        return self.add(key, "VAEDecode", 5, {"samples": latent, "vae": vae})

    def save_video(self, images, fps):
        video = self.add("video", "CreateVideo", 5, {"images": images}, fps=fps)
        self.add("save", "SaveVideo", 6, {"video": video}, filename_prefix=f"video/{self.name}")

    def save_image(self, images):
        self.add("save", "SaveImage", 6, {"images": images}, filename_prefix=self.name)


def wan21_text_to_video():
    graph = Example("wan2.1_text_to_video", "Wan 2.1 text to video with SpargeAttn",
                    "832×480, 81 frames: 32760 tokens, where attention takes most of a step. The first fifth of the "
                    "sampling stays dense, because it lays out the clip, and so does the first block.")
    model = graph.diffusion_model(f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors")
    clip = graph.text_encoder("wan", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    vae = graph.vae(f"{WAN21}/vae/wan_2.1_vae.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "blurry, static, low quality, subtitles")
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", 1, width=832, height=480, length=81)
    shifted = graph.add("shift", "ModelSamplingSD3", 1, {"model": model}, shift=8.0)
    model = graph.sparge(shifted, **VIDEO, dense_blocks="0")
    samples = graph.sample(model, positive, negative, latent, steps=30, cfg=6.0, sampler_name="uni_pc")
    graph.save_video(graph.decode(graph.report(model, samples), vae), 16)
    return graph


def _wan22(graph, kind, positive, negative, latent, vae):
    """Both experts of Wan 2.2 14B, each with its own Apply SpargeAttn and report."""
    latents = latent
    for key, low in (("high", False), ("low", True)):
        model = graph.diffusion_model(
            f"{WAN22}/diffusion_models/wan2.2_{kind}_{key}_noise_14B_fp8_scaled.safetensors", key)
        shifted = graph.add(f"shift_{key}", "ModelSamplingSD3", 1, {"model": model}, shift=8.0)
        model = graph.sparge(shifted, f"sparge_{key}", **VIDEO, dense_blocks="0")
        latents = graph.add(f"sampler_{key}", "KSamplerAdvanced", 3, {
            "model": model, "positive": positive, "negative": negative, "latent_image": latents},
            title=f"{key.capitalize()} noise", add_noise="disable" if low else "enable", noise_seed=SEED, steps=20,
            cfg=3.5, sampler_name="euler", scheduler="simple", start_at_step=10 if low else 0,
            end_at_step=10000 if low else 10, return_with_leftover_noise="disable" if low else "enable")
        latents = graph.report(model, latents, f"report_{key}")
    graph.save_video(graph.decode(latents, vae), 16)


_WAN22_ABOUT = ("Both experts get their own Apply SpargeAttn. start_percent counts over the whole schedule, so it "
                "keeps the first steps of the high-noise expert dense and has no effect on the other one.")


def wan22_text_to_video():
    graph = Example("wan2.2_text_to_video", "Wan 2.2 14B text to video with SpargeAttn", _WAN22_ABOUT)
    clip = graph.text_encoder("wan", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    vae = graph.vae(f"{WAN22}/vae/wan_2.1_vae.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "blurry, static, low quality, subtitles")
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", 1, width=832, height=480, length=81)
    _wan22(graph, "t2v", positive, negative, latent, vae)
    return graph


def wan22_image_to_video():
    graph = Example("wan2.2_image_to_video", "Wan 2.2 14B image to video with SpargeAttn", _WAN22_ABOUT)
    clip = graph.text_encoder("wan", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    vae = graph.vae(f"{WAN22}/vae/wan_2.1_vae.safetensors")
    image = graph.add("image", "LoadImage", 0, image="example.png")
    positive, negative = graph.prompts(clip, PROMPT, "blurry, static, low quality, subtitles")
    graph.add("latent", "WanImageToVideo", 1, {"positive": positive, "negative": negative, "vae": vae,
                                               "start_image": image}, width=832, height=480, length=81)
    _wan22(graph, "i2v", ("latent", 0), ("latent", 1), ("latent", 2), vae)
    return graph


def hunyuan_video():
    graph = Example("hunyuan_video_1.5_text_to_video", "HunyuanVideo 1.5 text to video with SpargeAttn",
                    "1280×720, 121 frames: more than a hundred thousand tokens, where attention is nearly all of a "
                    "step. Text tokens are always attended.")
    model = graph.diffusion_model(f"{HUNYUAN}/diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors")
    clip = graph.text_encoder("hunyuan_video_15",
                              f"{HUNYUAN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
                              f"{HUNYUAN}/text_encoders/byt5_small_glyphxl_fp16.safetensors")
    vae = graph.vae(f"{HUNYUAN}/vae/hunyuanvideo15_vae_fp16.safetensors")
    positive, negative = graph.prompts(clip, PROMPT)
    latent = graph.add("latent", "EmptyHunyuanVideo15Latent", 1, width=1280, height=720, length=121)
    shifted = graph.add("shift", "ModelSamplingSD3", 1, {"model": model}, shift=7.0)
    model = graph.sparge(shifted, **VIDEO, dense_blocks="0, 1")
    samples = graph.sample(model, positive, negative, latent, steps=20, cfg=6.0)
    graph.save_video(graph.decode(graph.report(model, samples), vae), 24)
    return graph


def mochi():
    graph = Example("mochi_text_to_video", "Mochi text to video with SpargeAttn",
                    "848×480, 163 frames: 44520 tokens. Mochi does not number its blocks, so dense_blocks has no "
                    "effect and the report counts calls.")
    model = graph.diffusion_model(f"{MOCHI}/diffusion_models/mochi_preview_bf16.safetensors")
    clip = graph.text_encoder("mochi", f"{FLUX_TEXT}/t5xxl_fp16.safetensors")
    vae = graph.vae(f"{MOCHI}/vae/mochi_vae.safetensors")
    positive, negative = graph.prompts(clip, PROMPT)
    latent = graph.add("latent", "EmptyMochiLatentVideo", 1, width=848, height=480, length=163)
    model = graph.sparge(model, **VIDEO)
    samples = graph.sample(model, positive, negative, latent, steps=30, cfg=4.5)
    graph.save_video(graph.decode(graph.report(model, samples), vae), 24)
    return graph


def ltx_video():
    graph = Example("ltx_video_text_to_video", "LTX-Video text to video with SpargeAttn",
                    "768×512, 97 frames: 4992 tokens. LTX-Video compresses so strongly that attention is a small part "
                    "of a step: larger and longer clips gain more.")
    model, _, vae = graph.checkpoint(f"{_HUB}/Lightricks/LTX-Video/resolve/main/ltx-video-2b-v0.9.safetensors")
    clip = graph.text_encoder("ltxv", f"{FLUX_TEXT}/t5xxl_fp16.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "low quality, distorted, motion smear")
    graph.add("conditioning", "LTXVConditioning", 1, {"positive": positive, "negative": negative}, frame_rate=25.0)
    latent = graph.add("latent", "EmptyLTXVLatentVideo", 1, width=768, height=512, length=97)
    model = graph.sparge(model, **VIDEO)
    sigmas = graph.add("sigmas", "LTXVScheduler", 2, {"latent": latent}, steps=30)
    sampler = graph.add("euler", "KSamplerSelect", 2, sampler_name="euler")
    samples = graph.add("sampler", "SamplerCustom", 3, {
        "model": model, "positive": ("conditioning", 0), "negative": ("conditioning", 1), "sampler": sampler,
        "sigmas": sigmas, "latent_image": latent}, add_noise=True, noise_seed=SEED, cfg=3.0)
    graph.save_video(graph.decode(graph.report(model, samples), vae), 25)
    return graph


def _flux(graph, unet):
    return (graph.diffusion_model(unet),
            graph.text_encoder("flux", f"{FLUX_TEXT}/clip_l.safetensors", f"{FLUX_TEXT}/t5xxl_fp16.safetensors"),
            graph.vae(FLUX_VAE))


def flux_dev():
    graph = Example("flux_dev_text_to_image", "FLUX.1 dev with SpargeAttn",
                    "1024×1024 has 4608 tokens, of which attention is a quarter of a step: expect a modest gain, and a "
                    "larger one with larger pictures. The first block of each kind stays dense.")
    model, clip, vae = _flux(graph, f"{_HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors")
    positive = graph.add("positive", "CLIPTextEncode", 1, {"clip": clip}, title="Prompt", text=PICTURE)
    guided = graph.add("guidance", "FluxGuidance", 1, {"conditioning": positive}, guidance=3.5)
    negative = graph.add("negative", "ConditioningZeroOut", 1, {"conditioning": positive})
    latent = graph.add("latent", "EmptySD3LatentImage", 1, width=1024, height=1024)
    model = graph.sparge(model, **IMAGE, dense_blocks="0")
    samples = graph.sample(model, guided, negative, latent, steps=20, cfg=1.0)
    graph.save_image(graph.decode(graph.report(model, samples), vae))
    return graph


def flux_kontext():
    graph = Example("flux_kontext_edit_image", "FLUX.1 Kontext with SpargeAttn",
                    "The picture to edit doubles the tokens of a step, so that attention weighs more than in FLUX.1 "
                    "dev.")
    model, clip, vae = _flux(graph, f"{_HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/"
                                    "diffusion_models/flux1-dev-kontext_fp8_scaled.safetensors")
    image = graph.add("image", "LoadImage", 0, image="example.png")
    scaled = graph.add("scale", "FluxKontextImageScale", 1, {"image": image})
    encoded = graph.add("encode", "VAEEncode", 1, {"pixels": scaled, "vae": vae})
    positive = graph.add("positive", "CLIPTextEncode", 1, {"clip": clip}, title="What to change",
                         text="Make it a snowy winter day")
    reference = graph.add("reference", "ReferenceLatent", 2, {"conditioning": positive, "latent": encoded})
    guided = graph.add("guidance", "FluxGuidance", 2, {"conditioning": reference}, guidance=2.5)
    negative = graph.add("negative", "ConditioningZeroOut", 2, {"conditioning": positive})
    model = graph.sparge(model, **IMAGE, dense_blocks="0")
    samples = graph.sample(model, guided, negative, encoded, steps=20, cfg=1.0)
    graph.save_image(graph.decode(graph.report(model, samples), vae))
    return graph


def sd35():
    graph = Example("sd3.5_text_to_image", "Stable Diffusion 3.5 Large with SpargeAttn",
                    "1024×1024: 4250 tokens, text included. SD3.5 does not number its blocks, so dense_blocks has no "
                    "effect. Expect a small gain at this size.")
    model, clip, vae = graph.checkpoint(f"{_HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/"
                                        "sd3.5_large_fp8_scaled.safetensors")
    positive, negative = graph.prompts(clip, PICTURE)
    latent = graph.add("latent", "EmptySD3LatentImage", 1, width=1024, height=1024)
    model = graph.sparge(model, **IMAGE)
    samples = graph.sample(model, positive, negative, latent, steps=20, cfg=4.0, scheduler="sgm_uniform")
    graph.save_image(graph.decode(graph.report(model, samples), vae))
    return graph


def qwen_image():
    graph = Example("qwen_image_text_to_image", "Qwen-Image with SpargeAttn",
                    "1328×1328: about 7000 tokens. Text in the picture is laid out in the first steps, which is why "
                    "the first 30% stay dense here.")
    model = graph.diffusion_model(f"{QWEN}/diffusion_models/qwen_image_fp8_e4m3fn.safetensors")
    clip = graph.text_encoder("qwen_image", f"{QWEN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors")
    vae = graph.vae(f"{QWEN}/vae/qwen_image_vae.safetensors")
    positive, negative = graph.prompts(clip, 'A small bookshop at night with a neon sign that says "SPARSE"')
    latent = graph.add("latent", "EmptySD3LatentImage", 1, width=1328, height=1328)
    shifted = graph.add("shift", "ModelSamplingAuraFlow", 1, {"model": model}, shift=3.1)
    model = graph.sparge(shifted, **IMAGE, start_percent=0.3, dense_blocks="0, 1")
    samples = graph.sample(model, positive, negative, latent, steps=20, cfg=4.0)
    graph.save_image(graph.decode(graph.report(model, samples), vae))
    return graph


def sdxl():
    graph = Example("sdxl_text_to_image", "SDXL with SpargeAttn",
                    "At 1024×1024 only the outer attention layers have 4096 tokens; the others have 1024 and stay "
                    "dense. There is little to gain at this size: it is worth it from 1536×1536 on, as here in the "
                    "second pass of a larger picture.")
    model, clip, vae = graph.checkpoint(f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"
                                        "sd_xl_base_1.0.safetensors")
    positive, negative = graph.prompts(clip, PICTURE, "text, watermark")
    latent = graph.add("latent", "EmptyLatentImage", 1, width=1024, height=1024)
    first = graph.sample(model, positive, negative, latent, steps=25, cfg=7.0, scheduler="karras",
                         sampler_name="dpmpp_2m", title="First pass, dense")
    larger = graph.add("larger", "LatentUpscaleBy", 3, {"samples": first}, upscale_method="bislerp", scale_by=2.0)
    model = graph.sparge(model, **IMAGE, start_percent=0.0)
    samples = graph.sample(model, positive, negative, larger, "second", "Second pass, sparse", steps=20, cfg=7.0,
                           scheduler="karras", sampler_name="dpmpp_2m", denoise=0.5)
    graph.save_image(graph.decode(graph.report(model, samples), vae))
    return graph


def compare():
    graph = Example("compare_dense_and_sparse", "Dense and sparse side by side",
                    "One loaded model, two branches with the same seed: left with dense attention, right with "
                    "SpargeAttn. Both clips are saved as one.")
    model = graph.diffusion_model(f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors")
    clip = graph.text_encoder("wan", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    vae = graph.vae(f"{WAN21}/vae/wan_2.1_vae.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "blurry, static, low quality, subtitles")
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", 1, width=832, height=480, length=81)
    shifted = graph.add("shift", "ModelSamplingSD3", 1, {"model": model}, shift=8.0)
    settings = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc"}
    sparse_model = graph.sparge(shifted, **VIDEO, dense_blocks="0")
    dense = graph.sample(shifted, positive, negative, latent, "dense", "Dense", **settings)
    sparse = graph.sample(sparse_model, positive, negative, latent, "sparse", "Sparse", **settings)
    left = graph.decode(dense, vae, "decode_dense")
    right = graph.decode(graph.report(sparse_model, sparse), vae, "decode_sparse")
    both = graph.add("both", "ImageStitch", 6, {"image1": left, "image2": right}, direction="right",
                     match_image_size=True, spacing_width=8, spacing_color="white")
    video = graph.add("video", "CreateVideo", 6, {"images": both}, fps=16)
    graph.add("save", "SaveVideo", 6, {"video": video}, filename_prefix=f"video/{graph.name}")
    return graph


def tune_and_save():
    graph = Example("tune_and_save", "Tune once and save with SpargeAttn",
                    "Finds thresholds for every layer and head on this prompt, saves them to `models/sparge_params`, "
                    "and samples with them. It takes minutes, once for a model; afterwards **Load SpargeAttn Params** "
                    "takes the place of the tuning node, and others can use your file.")
    model = graph.diffusion_model(f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors")
    clip = graph.text_encoder("wan", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    vae = graph.vae(f"{WAN21}/vae/wan_2.1_vae.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "blurry, static, low quality, subtitles")
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", 1, width=832, height=480, length=81)
    shifted = graph.add("shift", "ModelSamplingSD3", 1, {"model": model}, shift=8.0)
    settings = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc"}
    tuned = graph.add("tune", "SpargeAttnTune", 2, {"model": shifted, "positive": positive, "negative": negative,
                                                    "latent_image": latent}, seed=SEED, scheduler="simple", **settings)
    graph.add("save_params", "SpargeAttnSaveParams", 3, {"params": tuned}, filename="wan2.1_1.3b_480p")
    graph.add("tuning_report", "PreviewImage", 3, {"images": ("tune", 2)})
    model = graph.add("sparge", "ApplySpargeAttn", 3, {"model": shifted, "params": tuned}, **VIDEO, dense_blocks="0")
    samples = graph.add("sampler", "KSampler", 4, {
        "model": model, "positive": positive, "negative": negative, "latent_image": latent}, seed=SEED + 1,
        scheduler="simple", **settings)
    report = graph.add("report", "SpargeAttnReport", 5, {"model": model, "samples": samples})
    images = graph.add("decode", "VAEDecode", 6, {"samples": report, "vae": vae})
    video = graph.add("video", "CreateVideo", 6, {"images": images}, fps=16)
    graph.add("save", "SaveVideo", 7, {"video": video}, filename_prefix=f"video/{graph.name}")
    return graph


EXAMPLES = {graph.name: graph for graph in (make() for make in (
    wan21_text_to_video, wan22_text_to_video, wan22_image_to_video, hunyuan_video, mochi, ltx_video, flux_dev,
    flux_kontext, sd35, qwen_image, sdxl, compare, tune_and_save))}

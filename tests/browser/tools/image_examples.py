"""Example workflows that make pictures."""
from .example import FLUX_TEXT, GREY, HUB, Example

QWEN = f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
FLUX_VAE = f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"
PICTURE = "A wooden boat on a still mountain lake at dawn, mist over the water, detailed photograph"


def _flux(graph, unet):
    return (graph.diffusion_model(unet),
            graph.text_encoder("flux", f"{FLUX_TEXT}/clip_l.safetensors", f"{FLUX_TEXT}/t5xxl_fp16.safetensors"),
            graph.vae(FLUX_VAE))


def flux_dev():
    graph = Example("flux_dev_text_to_image", "FLUX.1 dev with SpargeAttn",
                    "1024×1024 has 4608 tokens, of which attention is a quarter of a step: expect a modest gain, and a "
                    "larger one with larger pictures. The first block of each kind stays dense.")
    model, clip, vae = _flux(graph, f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors")
    positive = graph.add("positive", "CLIPTextEncode", 1, {"clip": clip}, title="Prompt", text=PICTURE)
    guided = graph.add("guidance", "FluxGuidance", 1, {"conditioning": positive}, guidance=3.5)
    negative = graph.add("negative", "ConditioningZeroOut", 1, {"conditioning": positive})
    latent = graph.add("latent", "EmptySD3LatentImage", 1, width=1024, height=1024)
    model = graph.sparge(model, dense_blocks="0")
    samples = graph.sample(model, guided, negative, latent, steps=20, cfg=1.0)
    graph.save_image(graph.decode(graph.report(model, samples, "single:19"), vae))
    return graph


def flux_kontext():
    graph = Example("flux_kontext_edit_image", "FLUX.1 Kontext with SpargeAttn",
                    "The picture to edit doubles the tokens of a step, so that attention weighs more than in FLUX.1 "
                    "dev.")
    model, clip, vae = _flux(graph, f"{HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/"
                                    "diffusion_models/flux1-dev-kontext_fp8_scaled.safetensors")
    image = graph.add("image", "LoadImage", 0, image="example.png")
    scaled = graph.add("scale", "FluxKontextImageScale", 1, {"image": image})
    encoded = graph.add("encode", "VAEEncode", 1, {"pixels": scaled, "vae": vae})
    positive = graph.add("positive", "CLIPTextEncode", 1, {"clip": clip}, title="What to change",
                         text="Make it a snowy winter day")
    reference = graph.add("reference", "ReferenceLatent", 1, {"conditioning": positive, "latent": encoded})
    guided = graph.add("guidance", "FluxGuidance", 1, {"conditioning": reference}, guidance=2.5)
    negative = graph.add("negative", "ConditioningZeroOut", 1, {"conditioning": positive})
    model = graph.sparge(model, dense_blocks="0")
    samples = graph.sample(model, guided, negative, encoded, steps=20, cfg=1.0)
    graph.save_image(graph.decode(graph.report(model, samples, "single:19"), vae))
    return graph


def sd35():
    graph = Example("sd3.5_text_to_image", "Stable Diffusion 3.5 Large with SpargeAttn",
                    "1024×1024: 4250 tokens, text included. SD3.5 does not number its blocks, so dense_blocks has no "
                    "effect. Expect a small gain at this size.")
    model, clip, vae = graph.checkpoint(f"{HUB}/Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/"
                                        "sd3.5_large_fp8_scaled.safetensors")
    positive, negative = graph.prompts(clip, PICTURE)
    latent = graph.add("latent", "EmptySD3LatentImage", 1, width=1024, height=1024)
    model = graph.sparge(model)
    samples = graph.sample(model, positive, negative, latent, steps=20, cfg=4.0, scheduler="sgm_uniform")
    graph.save_image(graph.decode(graph.report(model, samples, "19"), vae))
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
    model = graph.sparge(shifted, start_percent=0.3, dense_blocks="0, 1")
    samples = graph.sample(model, positive, negative, latent, steps=20, cfg=4.0)
    graph.save_image(graph.decode(graph.report(model, samples, "30"), vae))
    return graph


def sdxl():
    graph = Example("sdxl_text_to_image", "SDXL with SpargeAttn",
                    "At 1024×1024 only the outer attention layers have 4096 tokens; the others have 1024 and stay "
                    "dense. There is little to gain at this size: it is worth it from 1536×1536 on, as here in the "
                    "second pass of a larger picture.")
    model, clip, vae = graph.checkpoint(f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"
                                        "sd_xl_base_1.0.safetensors")
    positive, negative = graph.prompts(clip, PICTURE, "text, watermark")
    latent = graph.add("latent", "EmptyLatentImage", 1, width=1024, height=1024)
    first_pass = "First pass, dense", GREY
    settings = {"cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    first = graph.sample(model, positive, negative, latent, "sampler", 0, "First pass, dense", steps=25,
                         group=first_pass, **settings)
    larger = graph.add("larger", "LatentUpscaleBy", 1, {"samples": first}, upscale_method="bislerp", scale_by=2.0,
                       group=first_pass)
    model = graph.sparge(model, start_percent=0.0)
    samples = graph.sample(model, positive, negative, larger, "second", 2, "Second pass, sparse", steps=20,
                           denoise=0.5, **settings)
    graph.save_image(graph.decode(graph.report(model, samples, "output:4"), vae))
    return graph

"""Example workflows that make clips."""
from .example import FLUX_TEXT, GREEN, GREY, HUB, SEED, Example

WAN21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN = f"{HUB}/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
MINIMAX = f"{HUB}/Comfy-Org/MiniMax-H3/resolve/main"
MOCHI = f"{HUB}/Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
# Where an example has many columns, its report has a smaller size, and all that follows stands below it.
NARROW, LOW = (480, 800), (280, 0)
PROMPT = "A red fox trots through fresh snow between tall pines, low winter sun, the camera follows at its side"


def minimax_h3():
    graph = Example("minimax_h3_text_to_video", "MiniMax-H3 text to video and sound with SpargeAttn",
                    "1344×768, 124 frames: 37296 tokens of the clip, some hundred of its sound, and the prompt. Text, "
                    "sound, key frames and reference pictures stay exact; what is left out are blocks of the clip.")
    model = graph.diffusion_model(f"{MINIMAX}/diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors")
    clip = graph.text_encoder("minimax", f"{MINIMAX}/text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors")
    vae = graph.vae(f"{MINIMAX}/vae/minimax_h3_video_vae_fp16.safetensors")
    sound_vae = graph.vae(f"{MINIMAX}/vae/minimax_h3_audio_vae_fp32.safetensors", "sound_vae")
    positive = graph.add("conditioning", "MiniMaxH3ImageToVideo", 1, {"clip": clip, "vae": vae}, width=1344, height=768,
                         length=124, prompt=f"{PROMPT}. Audio: paws in the snow, wind in the trees")
    model = graph.sparge(model)
    sigmas = graph.add("sigmas", "BasicScheduler", 2, {"model": model}, scheduler="simple", steps=20)
    sampler = graph.add("kind", "KSamplerSelect", 2, sampler_name="res_multistep")
    guider = graph.add("guider", "BasicGuider", 2, {"model": model, "conditioning": positive})
    noise = graph.add("noise", "RandomNoise", 2, noise_seed=SEED)
    samples = graph.add("sampler", "SamplerCustomAdvanced", 2, {
        "noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": ("conditioning", 1)})
    samples = graph.report(model, samples, "25")
    sound = graph.add("decode_sound", "VAEDecodeAudio", 5, {"samples": samples, "vae": sound_vae})
    graph.save_video(graph.decode(samples, vae), 24, sound=sound)
    return graph


def _wan21(graph):
    """Everything before the sampler of Wan 2.1 1.3B at 480p."""
    model = graph.diffusion_model(f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors")
    clip = graph.text_encoder("wan", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    vae = graph.vae(f"{WAN21}/vae/wan_2.1_vae.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "blurry, static, low quality, subtitles")
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", 1, width=832, height=480, length=81)
    shifted = graph.add("shift", "ModelSamplingSD3", 1, {"model": model}, shift=8.0)
    return shifted, vae, positive, negative, latent


def wan21_text_to_video():
    graph = Example("wan2.1_text_to_video", "Wan 2.1 text to video with SpargeAttn",
                    "832×480, 81 frames: 32760 tokens, where attention takes most of a step. The first part of the "
                    "sampling stays dense, because it lays out the clip, and so does the first block.")
    shifted, vae, positive, negative, latent = _wan21(graph)
    model = graph.sparge(shifted, dense_blocks="0")
    samples = graph.sample(model, positive, negative, latent, steps=30, cfg=6.0, sampler_name="uni_pc")
    graph.save_video(graph.decode(graph.report(model, samples, "15"), vae), 16)
    return graph


def _wan22(graph, kind, positive, negative, latent, vae):
    """Both experts of Wan 2.2 14B, each with its own Apply SpargeAttn."""
    latents = latent
    for column, (key, low) in enumerate((("high", False), ("low", True)), 2):
        expert = f"Expert for {key} noise", GREEN
        model = graph.diffusion_model(
            f"{WAN22}/diffusion_models/wan2.2_{kind}_{key}_noise_14B_fp8_scaled.safetensors", key)
        shifted = graph.add(f"shift_{key}", "ModelSamplingSD3", column, {"model": model}, shift=8.0, group=expert)
        model = graph.sparge(shifted, f"sparge_{key}", column, title=f"Apply SpargeAttn ({key} noise)", group=expert,
                             dense_blocks="0")
        latents = graph.add(f"sampler_{key}", "KSamplerAdvanced", column, {
            "model": model, "positive": positive, "negative": negative, "latent_image": latents}, group=expert,
            title=f"{key.capitalize()} noise", add_noise="disable" if low else "enable", noise_seed=SEED, steps=20,
            cfg=3.5, sampler_name="euler", scheduler="simple", start_at_step=10 if low else 0,
            end_at_step=10000 if low else 10, return_with_leftover_noise="disable" if low else "enable")
    report = graph.report(model, latents, "21", title="SpargeAttn Report (low noise)", size=NARROW)
    graph.save_video(graph.decode(report, vae, column=4), 16, 4, size=LOW)


_WAN22_ABOUT = ("Both experts get their own Apply SpargeAttn. start_percent counts over the whole schedule, so it "
                "keeps the first steps of the high-noise expert dense and has no effect on the other one. The report "
                "is of the low-noise expert; each Apply SpargeAttn shows on itself what its expert skipped.")


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
    image = graph.add("image", "LoadImage", 1, image="example.png")
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
    model = graph.sparge(shifted, dense_blocks="0, 1")
    samples = graph.sample(model, positive, negative, latent, steps=20, cfg=6.0)
    graph.save_video(graph.decode(graph.report(model, samples, "27"), vae), 24)
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
    model = graph.sparge(model)
    samples = graph.sample(model, positive, negative, latent, steps=30, cfg=4.5)
    graph.save_video(graph.decode(graph.report(model, samples, "24"), vae), 24)
    return graph


def ltx_video():
    graph = Example("ltx_video_text_to_video", "LTX-Video text to video with SpargeAttn",
                    "768×512, 97 frames: 4992 tokens. LTX-Video compresses so strongly that attention is a small part "
                    "of a step: larger and longer clips gain more.")
    model, _, vae = graph.checkpoint(f"{HUB}/Lightricks/LTX-Video/resolve/main/ltx-video-2b-v0.9.safetensors")
    clip = graph.text_encoder("ltxv", f"{FLUX_TEXT}/t5xxl_fp16.safetensors")
    positive, negative = graph.prompts(clip, PROMPT, "low quality, distorted, motion smear")
    graph.add("conditioning", "LTXVConditioning", 1, {"positive": positive, "negative": negative}, frame_rate=25.0)
    latent = graph.add("latent", "EmptyLTXVLatentVideo", 1, width=768, height=512, length=97)
    model = graph.sparge(model)
    sigmas = graph.add("sigmas", "LTXVScheduler", 2, {"latent": latent}, steps=30)
    sampler = graph.add("euler", "KSamplerSelect", 2, sampler_name="euler")
    samples = graph.add("sampler", "SamplerCustom", 2, {
        "model": model, "positive": ("conditioning", 0), "negative": ("conditioning", 1), "sampler": sampler,
        "sigmas": sigmas, "latent_image": latent}, add_noise=True, noise_seed=SEED, cfg=3.0)
    graph.save_video(graph.decode(graph.report(model, samples, "14"), vae), 25)
    return graph


def compare():
    graph = Example("compare_dense_and_sparse", "Dense and sparse side by side",
                    "One loaded model, two branches with the same seed: left with dense attention, right with "
                    "SpargeAttn. Both clips are saved as one.")
    shifted, vae, positive, negative, latent = _wan21(graph)
    settings = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc"}
    dense_branch = "Dense attention", GREY
    dense = graph.sample(shifted, positive, negative, latent, "dense", 0, "Dense", group=dense_branch, **settings)
    left = graph.decode(dense, vae, "decode_dense", 1, group=dense_branch)
    sparse_model = graph.sparge(shifted, dense_blocks="0")
    sparse = graph.sample(sparse_model, positive, negative, latent, "sparse", 2, "Sparse", **settings)
    right = graph.decode(graph.report(sparse_model, sparse, "15"), vae, "decode_sparse")
    both = graph.add("both", "ImageStitch", 5, {"image1": left, "image2": right}, direction="right",
                     match_image_size=True, spacing_width=8, spacing_color="white")
    graph.save_video(both, 16)
    return graph


def tune_and_save():
    graph = Example("tune_and_save", "Tune once and save with SpargeAttn",
                    "Finds thresholds for every layer and head on this prompt, saves them to `models/sparge_params`, "
                    "and samples with them. It takes minutes, once for a model; afterwards **Load SpargeAttn Params** "
                    "takes the place of the tuning node, and others can use your file.")
    shifted, vae, positive, negative, latent = _wan21(graph)
    settings = {"steps": 30, "cfg": 6.0, "sampler_name": "uni_pc"}
    tuning, found = ("Tune once", GREY), ("What was found", GREY)
    tuned = graph.add("tune", "SpargeAttnTune", 2, {
        "model": shifted, "positive": positive, "negative": negative, "latent_image": latent}, group=tuning, seed=SEED,
        scheduler="simple", **settings)
    graph.add("save_params", "SpargeAttnSaveParams", 0, {"params": tuned}, group=found, filename="wan2.1_1.3b_480p")
    graph.add("tuning_report", "PreviewImage", 1, {"images": ("tune", 2)}, group=found)
    model = graph.add("sparge", "ApplySpargeAttn", 3, {"model": shifted, "params": tuned}, dense_blocks="0")
    samples = graph.add("sampler", "KSampler", 3, {
        "model": model, "positive": positive, "negative": negative, "latent_image": latent}, seed=SEED + 1,
        scheduler="simple", **settings)
    report = graph.report(model, samples, "15", size=NARROW)
    graph.save_video(graph.decode(report, vae, column=4), 16, 4, size=LOW)
    return graph


def demo():
    """The one example that runs as it is; its model comes with the pack."""
    graph = Example("demo_without_download", "Try it now, without a download",
                    "A small video model comes with this pack. Press **Run**: it draws one clip with dense attention "
                    "and one with SpargeAttn from the same seed, and shows them side by side. On a CPU that takes "
                    "about a minute, and SpargeAttn, which is a slow reference there, is the slower of the two.\n\n"
                    "**On a GPU** set width 832, height 480, length 81 and 20 steps in both samplers: 32760 tokens, as "
                    "Wan 2.1 has at this size.")
    dense_branch = "Dense attention", GREY
    model = graph.add("model", "LoadSpargeAttnDemoModel", 0)
    positive = graph.add("scene", "EncodeSpargeAttnDemo", 1)
    negative = graph.add("negative", "ConditioningZeroOut", 1, {"conditioning": positive})
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", 1, width=320, height=256, length=33)
    settings = {"steps": 8, "cfg": 1.0}
    dense = graph.sample(model, positive, negative, latent, "dense", 0, "Dense", group=dense_branch, **settings)
    left = graph.add("decode_dense", "DecodeSpargeAttnDemo", 1, {"samples": dense}, group=dense_branch)
    model = graph.sparge(model)
    sparse = graph.sample(model, positive, negative, latent, "sparse", 2, "Sparse", **settings)
    # A run of eight steps keeps the maps of every second block.
    right = graph.add("decode_sparse", "DecodeSpargeAttnDemo", 5, {"samples": graph.report(model, sparse, "4")})
    both = graph.add("both", "ImageStitch", 5, {"image1": left, "image2": right}, direction="right",
                     match_image_size=True, spacing_width=8, spacing_color="white")
    graph.save_video(both, 7, title="Dense and sparse", size=(420, 370))
    return graph

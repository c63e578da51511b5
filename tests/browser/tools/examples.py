"""All example workflows, by the name of their files."""
from .image_examples import flux_dev, flux_kontext, qwen_image, sd35, sdxl
from .video_examples import (
    compare,
    demo,
    hunyuan_video,
    ltx_video,
    minimax_h3,
    mochi,
    tune_and_save,
    wan21_text_to_video,
    wan22_image_to_video,
    wan22_text_to_video,
)

EXAMPLES = {graph.name: graph for graph in (make() for make in (
    minimax_h3, wan21_text_to_video, wan22_text_to_video, wan22_image_to_video, hunyuan_video, mochi, ltx_video,
    flux_dev, flux_kontext, sd35, qwen_image, sdxl, compare, tune_and_save, demo))}

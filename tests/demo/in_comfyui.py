"""The comparison through ComfyUI's own loader and sampler, with the node pack loaded as ComfyUI loads packs."""

import logging
import re
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from comfyui_spargeattn.nodes.demo.words import encode

from ..nodes.host import comfy_host
from .compare import Run

WIDGETS = {"pv_threshold": 50.0, "end_percent": 1.0, "skipped_blocks": "drop", "pv_precision": "auto",
           "dense_blocks": "", "min_tokens": 1024, "verbose": False}


class _Report(logging.Handler):
    """Reads the mean sparsity off the pack's log lines."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.kept = 1.0

    def emit(self, record):
        if found := re.search(r"SpargeAttn: .*mean sparsity ([\d.]+)%", record.getMessage()):
            self.kept = 1 - float(found[1]) / 100


class ComfyUI:
    """ComfyUI started inside this process; its folder is named by the environment variable COMFYUI_PATH."""

    def __init__(self, checkpoint: Path):
        base = Path(tempfile.mkdtemp(prefix="comfyui-"))
        comfy_host.prepare_base_directory(base)
        self.nodes = comfy_host.start(base)
        import comfy.sd

        self.report = _Report()
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger().addHandler(self.report)
        self.model = comfy.sd.load_diffusion_model(str(checkpoint))

    def generate(self, name: str, params, prompt: Tensor, grid: tuple[int, int, int], steps: int, seed: int,
                 start_percent: float, after_step=None) -> Run:
        """Like ``compare.generate``. The time of attention is not taken: ComfyUI's own timing stays undisturbed."""
        import comfy.sample

        model, self.report.kept = self.model, 1.0
        if params is not None:
            node = self.nodes.NODE_CLASS_MAPPINGS["ApplySpargeAttn"]
            selection = {"selection": "cdf", "cdf_threshold": params.cdf_threshold,
                         "similarity_threshold": params.similarity_threshold}
            model = node.execute(model=model, selection=selection, start_percent=start_percent, **WIDGETS).result[0]
        shape = (1, 16, grid[0], 2 * grid[1], 2 * grid[2])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        condition = [[encode(prompt[None]), {}]]
        start = time.perf_counter()
        latent = comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", condition, condition,
                                     torch.zeros(shape), seed=seed, disable_pbar=True,
                                     callback=after_step and (lambda step, *_: after_step(step + 1)))
        seconds = time.perf_counter() - start
        return Run(name, model.model.process_latent_in(latent)[0].float(), seconds, None, self.report.kept)

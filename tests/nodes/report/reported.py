"""A run whose report is tested."""
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks
from comfyui_spargeattn.nodes.report.panels import run_report
from comfyui_spargeattn.nodes.run.block_maps import MapRequest
from comfyui_spargeattn.tests.nodes.stand_ins import Patcher

SETTINGS = NodeSettings(SpargeParams(topk=0.5, similarity_threshold=-1.0), start_percent=0.3, min_tokens=256,
                        dense_blocks=ListedBlocks.parse("2, 5-7"))
STEPS = 10
BLOCKS = 3


def dense_attention(q, k, v, heads, **kwargs):
    return torch.zeros_like(q)


def run(override, tokens=512, numbered=True):
    """A run of ten steps and three blocks of two heads; returns the inputs of its last call."""
    patcher, schedule = Patcher(), torch.linspace(1, 0, STEPS + 1)
    generator = torch.Generator().manual_seed(0)
    override.on_pre_run(patcher)
    for step in range(STEPS):
        timestep = schedule[step:step + 1].clone()
        override.on_prepare_state(patcher, timestep, {"transformer_options": {
            "sample_sigmas": schedule, "optimized_attention_override": override}})
        for block in range(BLOCKS):
            q, k = torch.randn(2, 1, tokens, 2 * 32, generator=generator)
            options = {"block_index": block} if numbered else {}
            override(dense_attention, q, k, k, 2, transformer_options=options)
            override(dense_attention, q, k[:, :77], k[:, :77], 2, transformer_options=options)
    override.on_cleanup(patcher)
    return q, k


def panels_of(override, block=None, head=0, step=0):
    return run_report(override.run.summary, override.settings, MapRequest(step, block, head))

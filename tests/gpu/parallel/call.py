"""An attention call on one GPU, and on two by yunchang's attention and xDiT's."""
from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from comfyui_spargeattn.kernels import SpargeParams, sparge_attention
from comfyui_spargeattn.tests.assertions import relative_l1
from comfyui_spargeattn.tests.cases import video_qkv
from comfyui_spargeattn.tests.gpu.parallel.setup import ATTENTIONS, BY_HEADS_ALONE, Setup
from comfyui_spargeattn.tests.kernels.integrations.libraries import long_context_attention

CDF = SpargeParams(cdf_threshold=0.8, similarity_threshold=-1.0)


def attention_classes() -> dict[str, type]:
    """name → the attention over several devices of each library that is there."""
    found = {}
    for library in ("yunchang", "xfuser"):
        try:
            found[library] = long_context_attention(library)
        except ImportError as error:
            print(f"{library} is left out: {error}", file=sys.stderr)
    return found


def measure_call(setup: Setup) -> dict:
    """name of the attention → where → time, speed-up and errors of an attention call by itself."""
    from yunchang import set_seq_parallel_pg

    heads_first = video_qkv(setup.grid, setup.heads, setup.dim, dtype=setup.dtype, device=setup.device)
    whole = [x.transpose(1, 2).contiguous() for x in heads_first]
    kept = sparge_attention(*whole, params=CDF, layout="BNHD", impl=setup.settings["impl"], return_stats=True)[1].kept
    whole = [x[:, :, kept[0].argsort(descending=True)].contiguous() for x in whole]
    heads_first = [x.transpose(1, 2).contiguous() for x in whole]

    def on_one(params):
        if params is None:
            return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        return sparge_attention(*whole, params=params, layout="BNHD", impl=setup.settings["impl"])

    found, outputs = {}, {}
    for name, params in {**ATTENTIONS, "cdf 0.8": CDF}.items():
        outputs[name] = on_one(params)
        found[name] = {"one GPU": {"ms": setup.milliseconds(lambda params=params: on_one(params)), "L1 to one GPU": 0.0,
                                   "L1 to dense": relative_l1(outputs[name], outputs["dense"])}}
    mine = [x.chunk(2, 1)[setup.rank].contiguous() for x in whole]
    for where, degrees in (("ulysses", (2, 1)), ("ring", (1, 2))):
        set_seq_parallel_pg(*degrees, setup.rank, 2)
        for library, kind in attention_classes().items():
            for name, params in {**ATTENTIONS, "cdf 0.8": CDF}.items():
                if where == "ring" and (name in BY_HEADS_ALONE or params is CDF):
                    continue
                for how in ("", " balanced") if params is CDF else ("",):
                    facts = shared_call(setup, library, kind, params, mine, bool(how))
                    out = facts.pop("out")
                    found[name][f"{library} {where}{how}"] = facts | {
                        "L1 to one GPU": setup.of_both(relative_l1(out, outputs[name].chunk(2, 1)[setup.rank])),
                        "L1 to dense": setup.of_both(relative_l1(out, outputs["dense"].chunk(2, 1)[setup.rank]))}
    return found


def shared_call(setup: Setup, library: str, kind: type, params: SpargeParams | None, mine: list[Tensor],
                balanced: bool) -> dict:
    """An attention call of both GPUs: this one's part of the result, the time, and what became of the calls."""
    from yunchang.kernels import AttnType

    from comfyui_spargeattn.kernels.integrations.yunchang import ATTN_TYPE, SpargeProcessor, balance_heads

    if params is None:
        attention = kind(attn_type=AttnType.TORCH_FLASH if setup.cuda else AttnType.TORCH_MATH)
    else:
        processor = SpargeProcessor(params=params, **setup.settings)
        attention = kind(attn_type=ATTN_TYPE, attn_processor=processor)
        processor.with_kept = params is CDF
        if balanced:
            balance_heads(attention)
    first = (None,) if library == "xfuser" else ()
    run = torch.no_grad()(lambda: attention(*first, *mine))
    facts = {"ms": setup.milliseconds(run), "out": run()}
    if params is not None:
        facts["calls"] = dict(processor.calls)
        if processor.with_kept:
            kept = processor.kept.mean().item()
            facts["kept by the busier GPU"] = setup.of_both(kept)
            facts["kept by the other"] = -setup.of_both(-kept)
    return facts

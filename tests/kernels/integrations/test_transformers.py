"""Small random models of Hugging Face transformers, dense and through SpargeAttn: no download."""
import copy
import inspect
import logging

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import (  # noqa: E402
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
)

from comfyui_spargeattn.kernels import FastPathError, SpargeParams  # noqa: E402
from comfyui_spargeattn.kernels.integrations import calls  # noqa: E402
from comfyui_spargeattn.kernels.integrations import transformers as integration  # noqa: E402
from comfyui_spargeattn.tests.kernels.integrations.libraries import DEVICE, IMPL  # noqa: E402

ALL = SpargeParams(topk=1.0)  # every block is kept
TOKENS = 300
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024)


def small(config_class=LlamaConfig, **changes):
    """A model with random weights, in its dense form."""
    torch.manual_seed(0)
    config = config_class(**SIZES | {"pad_token_id": 0} | changes)
    make = AutoModel if config_class is BertConfig else AutoModelForCausalLM
    return make.from_config(config, attn_implementation="sdpa").to(DEVICE).eval()


def sparse(model, params=ALL, **settings):
    """Put SpargeAttn into a model, and return it for its counts."""
    attention = integration.register(params=params, **dict(min_tokens=64, impl=IMPL) | settings)
    model.config._attn_implementation = "spargeattn"  # as set_attn_implementation, which 4.53 has not
    return attention


def prompt(batch=1, tokens=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (batch, tokens), generator=generator).to(DEVICE)


def padded(side):
    """Prompts of 300, 211 and 130 tokens, filled up at one side → ids, mask."""
    ids, mask = prompt(3), torch.ones(3, TOKENS, dtype=torch.long, device=DEVICE)
    for row, length in ((1, 211), (2, 130)):
        where = slice(0, TOKENS - length) if side == "left" else slice(length, TOKENS)
        ids[row, where], mask[row, where] = 0, 0
    return ids, mask


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs)[0]


def cache_of(output):
    """The cache that a model has filled, as its argument."""
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    return {name: getattr(output, name)}


def check_close(seen, expected):
    """INT8 Q·Kᵀ moves the kernels' output by some thousandths; the reference computes exactly."""
    largest = expected.abs().max()
    assert torch.isfinite(seen).all()
    assert (seen - expected).abs().max() < (1e-5 if IMPL == "reference" else 5e-2) * largest


@pytest.mark.parametrize("config", (LlamaConfig, Qwen3Config), ids=("llama", "qwen3"))
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_all_blocks_are_dense_attention(config, kv_heads):
    model = small(config, num_key_value_heads=kv_heads)
    expected = logits(model, prompt(2))
    attention = sparse(model)
    check_close(logits(model, prompt(2)), expected)
    assert attention.calls == {"sparse": 3}


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding(side):
    ids, mask = padded(side)
    model = small()
    expected = logits(model, ids, attention_mask=mask)[mask.bool()]
    attention = sparse(model)
    check_close(logits(model, ids, attention_mask=mask)[mask.bool()], expected)
    assert attention.calls == {"sparse": 3}


def test_padding_is_not_seen():
    """The rows of a batch give what they give alone, though the blocks of fewer keys differ."""
    ids, mask = padded("left")
    model = small()
    attention = sparse(model, SpargeParams(cdf_threshold=1.0))
    together = logits(model, ids, attention_mask=mask)
    for row in range(3):
        real = mask[row].bool()
        check_close(together[row, real], logits(model, ids[row, real][None])[0])
    assert attention.calls["sparse"] == 4 * 3


def test_bidirectional_encoder():
    model = small(BertConfig)
    if not model._supports_attention_backend:
        pytest.skip("attention of BERT can't be chosen in this version of transformers")
    ids, mask = padded("right")
    expected = logits(model, ids, attention_mask=mask)[mask.bool()]
    kept = []
    attention = sparse(model, on_stats=lambda module, stats: kept.append(stats.kept))
    check_close(logits(model, ids, attention_mask=mask)[mask.bool()], expected)
    assert attention.calls == {"sparse": 3}
    # A causal call would have no more than the pairs below the diagonal; kept counts what dense attention computes.
    assert all(torch.equal(share, torch.ones_like(share)) for share in kept)


@pytest.mark.parametrize("cache", (None, "static"))
@pytest.mark.parametrize("padding", (False, True))
def test_generate(cache, padding):
    """Prefill goes sparse and decode steps stay dense; greedy tokens are those of dense attention."""
    ids, mask = padded("left") if padding else (prompt(), torch.ones_like(prompt()))
    how = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
               **{"cache_implementation": cache} if cache else {}, disable_compile=True)
    model = small()
    expected = model.generate(ids, **how)
    attention = sparse(model)
    assert torch.equal(model.generate(ids, **how), expected)
    assert attention.calls == {"sparse": 3, "decode step": 5 * 3}


def test_a_low_share_changes_the_prefill_alone():
    """What goes sparse is really sparse, and a decode step after it is sdpa's to the bit."""
    model = small()
    expected = logits(model, prompt(tokens=600))
    kept = {}
    attention = sparse(model, SpargeParams(topk=0.2), sink_tokens=0, last_tokens=0,
                       on_stats=lambda module, stats: kept.update({module.layer_idx: stats.kept}))
    with torch.no_grad():
        filled = model(prompt(tokens=600), use_cache=True)
    assert not torch.allclose(filled.logits, expected, rtol=1e-3)
    assert sorted(kept) == [0, 1, 2] and all((share < 0.9).all() for share in kept.values())
    step, past = prompt(tokens=1, seed=3), cache_of(filled)
    seen = logits(model, step, **copy.deepcopy(past))
    model.config._attn_implementation = "sdpa"
    assert torch.equal(seen, logits(model, step, **past))
    assert attention.calls == {"sparse": 3, "decode step": 3}


def layer(**attributes):
    return type("Layer", (torch.nn.Module,), {"is_causal": True, "num_key_value_groups": 1} | attributes)()


def call(attention, module=None, tokens=200, mask=None, dtype=torch.float32, **kwargs):
    """The attention function itself, with random q, k and v → them and its output."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 16, device=DEVICE, dtype=dtype) for _ in range(3))
    return (q, k, v), attention(module or layer(), q, k, v, mask, **kwargs)[0]


def sliding(tokens=200, window=50):
    at = torch.arange(tokens, device=DEVICE)
    return ((at <= at[:, None]) & (at > at[:, None] - window))[None, None]


@pytest.mark.parametrize("reason, settings, arguments", (
    ("decode step", {}, dict(tokens=1)),
    ("fewer tokens than min_tokens", {}, dict(tokens=63)),
    ("listed in dense_layers", dict(dense_layers=(0, 1)), dict(module=layer(layer_idx=1))),
    ("attention maps are wanted", {}, dict(output_attentions=True)),
    ("head mask", {}, dict(head_mask=torch.ones(2))),
    ("sliding window", {}, dict(mask=sliding(), sliding_window=50)),
    ("mask is neither causal nor by key", {}, dict(mask=sliding())),
    ("dropout", {}, dict(dropout=1e-12)),
    ("unsupported dtype", {}, dict(dtype=torch.float64)),
    ("unsupported numbers of heads", dict(params=SpargeParams(topk=torch.ones(3))), {}),
    *((("no fast kernels here", dict(impl="auto"), {}),) if DEVICE == "cpu" else ()),
))
def test_stays_dense(reason, settings, arguments, caplog):
    attention = integration.register(**dict(min_tokens=64, impl=IMPL, params=ALL) | settings)
    with caplog.at_level(logging.INFO, logger="comfyui_spargeattn"):
        for _ in range(2):
            (q, k, v), out = call(attention, **arguments)
    kwargs = {name: value for name, value in arguments.items() if name not in ("tokens", "mask", "dtype", "module")}
    expected = AttentionInterface()["sdpa"](arguments.get("module") or layer(), q, k, v, arguments.get("mask"),
                                            **kwargs)[0]
    assert torch.equal(out, expected)
    assert attention.calls == {reason: 2}
    assert [record.message for record in caplog.records if reason in record.message] == [
        caplog.records[0].message], "logged once"


def test_gradients_are_those_of_sdpa():
    model = small()
    gradients = []
    for implementation in ("sdpa", "spargeattn"):
        attention = sparse(model)
        model.config._attn_implementation = implementation
        model.zero_grad()
        model(prompt())[0].square().mean().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert torch.equal(*gradients)
    assert attention.calls == {"gradients are needed": 3}


@pytest.mark.parametrize("window", (100, 1000))
def test_model_with_sliding_windows(window):
    """A window shorter than the prompt stays dense; a longer one masks nothing."""
    model = small(MistralConfig, sliding_window=window)
    expected = logits(model, prompt())
    attention = sparse(model)
    check_close(logits(model, prompt()), expected)
    assert attention.calls == {"sliding window" if window < TOKENS else "sparse": 3}


def test_prompt_in_pieces():
    """The second piece attends the first one's keys: its mask is not aligned at the first token."""
    model = small()
    ids = prompt()
    expected = logits(model, ids)[:, 200:]
    attention = sparse(model)
    with torch.no_grad():
        past = cache_of(model(ids[:, :200], use_cache=True))
        check_close(model(ids[:, 200:], **past)[0], expected)
    assert attention.calls == {"sparse": 3, "mask is neither causal nor by key": 3}


def test_packed_sequences_stay_dense():
    """Positions that start anew make two sequences of one row, which must not see each other."""
    model = small()
    positions = torch.cat([torch.arange(180), torch.arange(120)])[None].to(DEVICE)
    inputs = dict(position_ids=positions, use_cache=False)
    expected = logits(model, prompt(), **inputs)
    attention = sparse(model)
    assert torch.equal(logits(model, prompt(), **inputs), expected)
    assert attention.calls == {"mask is neither causal nor by key": 3}


def masks(tokens=200):
    """name → mask, whether it is causal, padded keys; None where SpargeAttn can't take it."""
    causal = (torch.arange(tokens) <= torch.arange(tokens)[:, None])[None, None]
    exists = torch.ones(2, tokens, dtype=torch.bool)
    exists[1, :70] = False
    exists[0, 120:] = False
    both = causal & exists[:, None, None]
    unmasked = both | ~both.any(-1, keepdim=True)
    least = torch.zeros(both.shape).masked_fill(~both, torch.finfo(torch.float32).min)
    hole = both.clone()
    hole[1, 0, 150, 100] = False
    biased = least.clone()
    biased[0, 0, 100, 50] = -1.0
    return {
        "causal": (causal, True, torch.zeros(1, tokens, dtype=torch.bool)),
        "causal, padded": (both, True, ~exists),
        "causal, padded, queries of padding attend all": (unmasked, True, ~exists),
        "floating": (least, True, ~exists),
        "floating, -inf": (least.masked_fill(~both, -torch.inf), True, ~exists),
        "by key": (exists[:, None, None].expand(-1, 1, tokens, -1), False, ~exists),
        "wider than the keys": (torch.nn.functional.pad(both, (0, 10)), True, ~exists),
        "a hole": (hole, None, None),
        "a bias": (biased, None, None),
        "differs between heads": (both.expand(-1, 2, -1, -1), None, None),
        "two dimensions": (exists, None, None),
        "one key ahead": ((torch.arange(tokens) <= torch.arange(tokens)[:, None] + 1)[None, None], None, None),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("rows", (64, 1024))
def test_read_mask(name, rows, monkeypatch):
    monkeypatch.setattr(integration, "_ROWS", rows)
    mask, causal, padding = masks()[name]
    seen = integration.read_mask(mask, 200, 200)
    if causal is None:
        assert seen is None
        return
    assert seen.causal is causal
    assert torch.equal(torch.zeros_like(padding) if seen.padding is None else seen.padding, padding)
    assert seen.spans == tuple((int((~row).nonzero()[0]), int((~row).nonzero()[-1]) + 1) for row in padding)


def test_one_mask_for_a_batch():
    mask = masks()["causal, padded"][0][1:].to(DEVICE)
    attention = integration.register(params=ALL, min_tokens=64, impl=IMPL)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 200, 16, device=DEVICE) for _ in range(3))
    expected = AttentionInterface()["sdpa"](layer(), q, k, v, mask)[0]
    check_close(attention(layer(), q, k, v, mask)[0][:, 70:], expected[:, 70:])
    assert attention.calls == {"sparse": 1}


def test_a_mask_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(integration, "read_mask", lambda mask, *tokens: read.append(mask.shape))
    ids, mask = padded("left")
    model = small()
    attention = sparse(model)
    logits(model, ids, attention_mask=mask)
    assert attention.calls == {"mask is neither causal nor by key": 3}
    assert read == [(3, 1, TOKENS, TOKENS)]


def test_ends_of_each_sequence_are_exact(monkeypatch):
    """The first tokens of every row are sinks, and the last ones attend everything, wherever padding puts them."""
    seen = {}

    def attention(q, k, v, **how):
        seen.update(how)
        return q.clone()

    monkeypatch.setattr(calls, "sparge_attention", attention)
    mask = masks()["causal, padded"][0].to(DEVICE)
    registered = integration.register(min_tokens=64, impl="reference", sink_tokens=4, last_tokens=2)
    torch.manual_seed(0)
    q = torch.randn(2, 2, 200, 16, device=DEVICE)
    registered(layer(), q, q, q, mask)
    assert seen["sink_keys"] == [(0, 4), (70, 74)] and seen["dense_queries"] == [(118, 120), (198, 200)]
    registered(layer(), q, q, q, None)
    assert seen["sink_keys"] == [(0, 4)] and seen["dense_queries"] == [(198, 200)] and seen["causal"]


@pytest.mark.parametrize("error", (FastPathError("no compiler"), torch.OutOfMemoryError("full")))
def test_a_failing_kernel_leaves_the_call_dense(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(calls, "sparge_attention", fail)
    attention = integration.register(min_tokens=64, impl="reference")
    (q, k, v), out = call(attention)
    assert torch.equal(out, AttentionInterface()["sdpa"](layer(), q, k, v, None)[0])
    assert sum(attention.calls.values()) == 1 and "sparse" not in attention.calls


def test_compiles_in_one_graph():
    model = small()
    expected = logits(model, prompt())
    sparse(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_close(logits(compiled, prompt(), use_cache=False), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("settings, words", (
    (dict(params=0.9), "params must be SpargeParams; got float"),
    (dict(min_tokens=-1), "min_tokens must be an integer ≥ 0; got -1"),
    (dict(sink_tokens=1.5), "sink_tokens must be an integer ≥ 0; got 1.5"),
    (dict(impl="cuda"), "impl must be one of auto, triton, reference; got 'cuda'"),
    (dict(skipped="zero"), "skipped must be one of"),
    (dict(pv_dtype="int4"), "pv_dtype must be one of"),
))
def test_settings_are_checked(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        integration.register(**settings)


@pytest.mark.parametrize("arguments, words", (
    (dict(s_aux=torch.zeros(2)), "s_aux must be None"),
    (dict(cu_seq_lens_q=torch.tensor([0, 100, 200])), "cu_seq_lens_q must be None"),
))
def test_what_sdpa_would_ignore_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        call(integration.register(min_tokens=64, impl="reference"), **arguments)

"""Small random models of Hugging Face diffusers, dense and through SpargeAttn, in one process and in two."""
import logging

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.models import attention_dispatch  # noqa: E402

from comfyui_spargeattn.kernels import FastPathError, SpargeParams, dense_attention  # noqa: E402
from comfyui_spargeattn.kernels.integrations import calls  # noqa: E402
from comfyui_spargeattn.kernels.integrations import diffusers as integration  # noqa: E402
from comfyui_spargeattn.tests.assertions import assert_near, relative_l1  # noqa: E402
from comfyui_spargeattn.tests.kernels.integrations.libraries import BOUND, DEVICE, IMPL, two_devices  # noqa: E402
from comfyui_spargeattn.tests.kernels.integrations.pair import found_by_two  # noqa: E402

ALL = SpargeParams(topk=1.0)  # every block is kept
HALF = SpargeParams(topk=0.5)
LATENT = (1, 16, 4, 24, 24)  # 576 tokens
LAYERS = 2


def small_model():
    torch.manual_seed(0)
    return WanTransformer3DModel(num_attention_heads=4, attention_head_dim=32, text_dim=64, freq_dim=64, ffn_dim=128,
                                 num_layers=LAYERS).to(DEVICE).eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@torch.no_grad()
def evaluate(model):
    generator = torch.Generator().manual_seed(1)
    latent, text = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in (LATENT, (1, 20, 64)))
    return model(latent, torch.tensor([500], device=DEVICE), text, return_dict=False)[0]


@pytest.fixture
def native(model):
    model.set_attention_backend("native")
    yield evaluate(model)
    model.set_attention_backend("native")


def sparse(model, params=HALF, **settings):
    """Put SpargeAttn into a model, and return it for its counts."""
    backend = integration.register(params=params, **dict(min_tokens=500, impl=IMPL) | settings)
    model.set_attention_backend("spargeattn")
    return backend


def test_every_block_gives_the_native_result(model, native):
    backend = sparse(model, ALL)
    assert relative_l1(evaluate(model), native) < BOUND
    assert backend.calls == {"sparse": LAYERS, "cross-attention": LAYERS}


def test_half_of_the_blocks(model, native):
    backend = sparse(model)
    error = relative_l1(evaluate(model), native)
    assert BOUND < error < 0.5 and backend.calls["sparse"] == LAYERS


@pytest.mark.parametrize("reason, settings", [
    ("fewer tokens than min_tokens", dict(min_tokens=577)),
    ("unsupported numbers of heads", dict(params=SpargeParams(topk=torch.full((3,), 0.5)))),
] + ([] if DEVICE == "cuda" else [("no fast kernels here", dict(impl="auto"))]))
def test_stays_dense(model, native, reason, settings, caplog):
    with caplog.at_level(logging.INFO, logger="comfyui_spargeattn"):
        backend = sparse(model, **settings)
        assert torch.equal(evaluate(model), native)
    assert backend.calls == {reason: LAYERS, "cross-attention": LAYERS}
    assert sum(reason in record.message for record in caplog.records) == 1, "logged once"


@pytest.mark.parametrize("failure", (FastPathError("no compiler"), torch.OutOfMemoryError("no room")))
def test_a_call_that_fails_goes_dense(model, native, failure, monkeypatch):
    def fails(*args, **kwargs):
        raise failure

    monkeypatch.setattr(calls, "sparge_attention", fails)
    backend = sparse(model)
    assert torch.equal(evaluate(model), native) and "sparse" not in backend.calls


def test_gradients_go_dense():
    backend = integration.register(params=HALF, min_tokens=500, impl=IMPL)
    x = torch.randn(1, 576, 4, 32, device=DEVICE, requires_grad=True)
    attention_dispatch.dispatch_attention_fn(x, x, x, backend="spargeattn").sum().backward()
    assert x.grad is not None and backend.calls == {"gradients are needed": 1}


@pytest.mark.parametrize("mask", ("padding", "four dimensions", "bias", "by query"))
def test_masks(mask):
    q, k, v = (torch.randn(2, 600, 4, 32, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3))
    attends = torch.arange(600, device=DEVICE).expand(2, -1) < torch.tensor([[400], [600]], device=DEVICE)
    given = {"padding": attends, "four dimensions": attends[:, None, None],
             "bias": torch.zeros(2, 1, 1, 600, device=DEVICE).masked_fill(~attends[:, None, None], -1e5),
             "by query": attends[:, None, None].expand(-1, 1, 600, -1)}[mask]
    backend = integration.register(params=ALL, min_tokens=500, impl=IMPL)
    out = attention_dispatch.dispatch_attention_fn(q, k, v, attn_mask=given, backend="spargeattn")
    expected = dense_attention(*(x.transpose(1, 2) for x in (q, k, v)), key_padding_mask=~attends).transpose(1, 2)
    assert relative_l1(out, expected) < BOUND
    assert backend.calls == {"mask is not by key" if mask == "by query" else "sparse": 1}


@pytest.mark.parametrize("return_lse", (False, True))
@pytest.mark.parametrize("settings", [dict(params=SpargeParams(topk=torch.full((8,), 0.5)))] + (
    [] if DEVICE == "cuda" else [dict(impl="auto")]))
def test_part_of_one_device_that_can_not_go_sparse(settings, return_lse):
    """The other devices wait for it: it is computed exactly, as diffusers' native backend or a ring needs it."""
    q, k, v = (torch.randn(1, 600, 4, 32, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3))
    backend = integration.register(**dict(min_tokens=500, impl=IMPL) | settings)
    result = integration._Forward(backend, backend.params)(None, q, k, v, return_lse=return_lse)
    out, lse = result if return_lse else (result, None)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    assert relative_l1(out, dense_attention(q, k, v).transpose(1, 2)) < 1e-5
    if return_lse:
        assert_near(lse.transpose(1, 2), (q @ k.mT * 32 ** -0.5).logsumexp(-1), atol=1e-4)
    assert sum(backend.calls.values()) == 1 and "sparse" not in backend.calls


def test_names():
    first = integration.register("another", params=ALL)
    assert integration.register("another", params=HALF) is not first
    assert attention_dispatch.AttentionBackendName("another").value == "another"
    for wrong in ("native", "", "Upper", 3):
        with pytest.raises(ValueError, match="name must be"):
            integration.register(wrong)
    with pytest.raises(ValueError, match="pv_dtype must be"):
        integration.register(pv_dtype="fp7")
    with pytest.raises(ValueError, match="layers must be an integer ≥ 0; got -1"):
        integration.register(layers=-1)


@two_devices
@pytest.mark.parametrize("kind", ("ulysses", "ring"))
def test_context_parallelism(kind, tmp_path):
    """Two processes, on two GPUs or on the CPU, give what one gives."""
    [found] = found_by_two("two_processes", kind, tmp_path)
    assert found["calls"] == {"sparse": LAYERS, "cross-attention": LAYERS}
    assert found["every block"] < BOUND and found["dense"] < BOUND
    # Ulysses computes the same heads with the same map. A ring selects from each half of the keys by itself.
    assert found["between"] < (1e-5 if kind == "ulysses" else found["one"] + found["two"])
    assert found["two"] < 1.5 * found["one"]

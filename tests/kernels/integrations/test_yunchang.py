"""yunchang's attention over several processes with SpargeAttn inside."""
import logging
import os

import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError, SpargeParams, dense_attention, sparge_attention
from comfyui_spargeattn.kernels.integrations import calls
from comfyui_spargeattn.kernels.integrations.yunchang import SpargeProcessor, register
from comfyui_spargeattn.tests.assertions import assert_near, relative_l1
from comfyui_spargeattn.tests.cases import drifting_qkv
from comfyui_spargeattn.tests.kernels.integrations.libraries import BOUND, DEVICE, IMPL, needs, two_devices
from comfyui_spargeattn.tests.kernels.integrations.pair import found_by_two

HALF = SpargeParams(topk=0.5)
ALL = SpargeParams(topk=1.0)
TOKENS, HEADS = 1024, 4


def inputs():
    """q, k, v (1, TOKENS, HEADS, 32) and their dense attention."""
    q, k, v = drifting_qkv(1, HEADS, TOKENS, 32, dtype=torch.float32, device=DEVICE)
    dense = dense_attention(q, k, v)
    return [x.transpose(1, 2).contiguous() for x in (q, k, v, dense)]


def test_one_call():
    q, k, v, dense = inputs()
    processor = SpargeProcessor(params=HALF, min_tokens=500, impl=IMPL)
    out, lse = processor(q, k, v, softmax_scale=0.2, return_softmax=False, deterministic=False)
    expected, expected_lse = sparge_attention(q, k, v, params=HALF, scale=0.2, layout="BNHD", impl=IMPL,
                                              return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and lse.shape == (1, HEADS, TOKENS)
    assert processor.calls == {"sparse": 1}


@pytest.mark.parametrize("reason, settings", [
    ("fewer tokens than min_tokens", dict(min_tokens=1025)),
    ("unsupported numbers of heads", dict(params=SpargeParams(topk=torch.full((3,), 0.5)))),
] + ([] if DEVICE == "cuda" else [("no fast kernels here", dict(impl="auto"))]))
def test_every_block_is_kept(reason, settings, caplog):
    q, k, v, dense = inputs()
    processor = SpargeProcessor(**dict(params=HALF, min_tokens=500, impl=IMPL) | settings)
    with caplog.at_level(logging.INFO, logger="comfyui_spargeattn"):
        for _ in range(2):
            out, lse = processor(q, k, v)
    assert relative_l1(out, dense) < BOUND and processor.calls == {reason: 2}
    assert_near(lse, (q.transpose(1, 2).double() @ k.transpose(1, 2).double().mT * 32 ** -0.5).logsumexp(-1), atol=0.1)
    assert sum(reason in record.message for record in caplog.records) == 1, "logged once"


@pytest.mark.parametrize("failure", (FastPathError("no compiler"), torch.OutOfMemoryError("no room")))
def test_a_call_that_fails(failure, monkeypatch):
    q, k, v, dense = inputs()

    def fails(*args, impl, **call):
        if impl != "reference" or call["params"] is HALF:
            raise failure
        return sparge_attention(*args, impl=impl, **call)

    monkeypatch.setattr(calls, "sparge_attention", fails)
    processor = SpargeProcessor(params=HALF, min_tokens=500, impl=IMPL)
    assert relative_l1(processor(q, k, v)[0], dense) < 1e-5 and "sparse" not in processor.calls


@pytest.mark.parametrize("wrong", (dict(window_size=(128, 0)), dict(softcap=30.0), dict(alibi_slopes=torch.ones(4))))
def test_another_attention_is_refused(wrong):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        SpargeProcessor(impl=IMPL)(q, k, v, **wrong)


def test_a_type_of_yunchang():
    """As raylight lists the types and finds the chosen one, by name."""
    kernels = pytest.importorskip("yunchang", reason="yunchang is not installed").kernels
    own = list(kernels.AttnType)
    for _ in range(2):  # the second one replaces the first
        processor = register(min_tokens=500, impl=IMPL)
        assert [kind.name for kind in kernels.AttnType] == [*(kind.name for kind in own), "SPARGEATTN"]
    member = kernels.AttnType["SPARGEATTN"]
    assert kernels.AttnType.from_string("spargeattn") is member is kernels.AttnType.SPARGEATTN
    assert kernels.select_flash_attn_impl(member, "fwd-only", processor) is processor


@pytest.mark.parametrize("wrong, message", (
    (dict(name="FA"), "name must be none of the library's own; got 'FA'"),
    (dict(name="two words"), "name must be an identifier; got 'two words'"),
    (dict(layers=-1), "layers must be an integer ≥ 1; got -1"),
    (dict(pv_dtype="fp7"), "pv_dtype must be"),
))
def test_what_register_can_not_take(wrong, message):
    pytest.importorskip("yunchang", reason="yunchang is not installed")
    with pytest.raises(ValueError, match=message):
        register(**wrong)


@two_devices
@pytest.mark.parametrize("kind", ("ulysses", "ring"))
@pytest.mark.parametrize("library", ("yunchang", "xfuser"))
def test_two_processes(library, kind, tmp_path):
    """On two GPUs or on the CPU; the parts that they return make the whole."""
    needs(library)
    both = found_by_two("two_parts", f"{library}-{kind}", tmp_path)
    assert len(both) == 2
    for found in both:
        assert found["calls"] == {"sparse": 1 if kind == "ulysses" else 2}
        assert found["every block"] < BOUND and BOUND < found["sparse"] < 0.5
        if kind == "ulysses":  # the same heads and the same map
            assert found["against one process"] < 1e-6


@pytest.mark.skipif("RAYLIGHT_PATH" not in os.environ, reason="set RAYLIGHT_PATH to a checkout of raylight")
@two_devices
@pytest.mark.parametrize("kind", ("ulysses", "ring"))
def test_raylight(kind, tmp_path):
    """Its own attention function, of the type that is registered here."""
    needs("xfuser")
    both = found_by_two("two_raylight", kind, tmp_path)
    assert len(both) == 2
    for found in both:
        assert found["calls"] == {"sparse": 3 if kind == "ulysses" else 4}
        assert max(found["flat"], found["split"]) < (1e-6 if kind == "ulysses" else 0.1)
        assert kind == "ring" or found["joint"] < BOUND

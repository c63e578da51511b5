"""Fast kernels that fail: what is raised, what the user reads, and what is tried again."""
import sys
import types

import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError, capability, dispatch, failures, select_implementation
from comfyui_spargeattn.kernels import sparge_attention as attend
from comfyui_spargeattn.tests.cases import drifting_qkv


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """A device that the kernels take, and nothing remembered."""
    monkeypatch.setattr(capability, "arch_of", lambda device: "sm90")
    monkeypatch.setattr(capability, "has_triton", lambda: True)
    monkeypatch.setattr(capability, "triton_version", lambda: (3, 6))
    failures.forget()
    yield
    failures.forget()


def inputs(dim=16):
    return drifting_qkv(1, 1, 40, dim)


def kernels_that(monkeypatch, error):
    """A fast path whose first launch ends in `error`; the list of its calls."""
    calls = []

    def attention(q, k, v, out, lse, call):
        calls.append(q.shape)
        try:
            raise error
        except Exception as problem:
            failures.raise_failed("kernel _attend_kernel", problem)

    monkeypatch.setattr(dispatch, "_pipeline", lambda: types.SimpleNamespace(attention=attention))
    return calls


CAUSES = [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "C compiler"),
    (ImportError("DLL load failed while importing libtriton"), "pip install triton"),
    (RuntimeError("PTXASError: ptxas exited with 255"), "update the driver"),
    (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"), "driver"),
    (RuntimeError("out of resource: shared memory, Required: 110592, Hardware limit: 101376"), "shared memory"),
    (RuntimeError("fatal error: Python.h: No such file or directory"), "python3-dev"),
    (TypeError("Cannot broadcast, rank mismatch: [64], [64, 128]"), "pip install triton"),
]


@pytest.mark.parametrize("error, says", CAUSES, ids=[str(error)[:24] for error, _ in CAUSES])
def test_is_tried_once_and_told_once(error, says, monkeypatch, caplog):
    calls, (q, k, v) = kernels_that(monkeypatch, error), inputs()
    assert select_implementation(q) == ("triton", None)
    with pytest.raises(FastPathError, match=says):
        attend(q, k, v, impl="triton")
    name, reason = select_implementation(q)
    assert name == "reference" and says in reason and "_attend_kernel" in reason
    expected = attend(q, k, v, impl="reference")
    for _ in range(3):
        assert torch.equal(attend(q, k, v, impl="auto"), expected)
    assert len(calls) == 1
    assert len([record for record in caplog.records if "fast kernels are off" in record.message]) == 1


def test_auto_falls_back_at_the_first_failure(monkeypatch):
    kernels_that(monkeypatch, RuntimeError("Failed to find C compiler"))
    q, k, v = inputs()
    assert torch.equal(attend(q, k, v), attend(q, k, v, impl="reference"))


def test_other_kinds_of_calls_are_still_tried(monkeypatch):
    calls = kernels_that(monkeypatch, RuntimeError("out of resource: shared memory"))
    attend(*inputs(16))
    attend(*inputs(24))
    assert [shape[-1] for shape in calls] == [16, 24]


BROKEN = ("CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: misaligned address",
          "CUDA error: unspecified launch failure", "CUDA error: device-side assert triggered")


@pytest.mark.parametrize("text", BROKEN)
def test_errors_of_the_device_are_never_swallowed(text, monkeypatch):
    calls, (q, k, v) = kernels_that(monkeypatch, RuntimeError(text)), inputs()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text.split(":")[1].strip()[:10]) as raised:
            attend(q, k, v)
        assert not isinstance(raised.value, FastPathError)
    assert len(calls) == 2 and select_implementation(q) == ("triton", None)


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("no room"),
                                   RuntimeError("Triton Error [CUDA]: out of memory")), ids=str)
def test_memory_that_runs_out_is_no_failure(error, monkeypatch):
    kernels_that(monkeypatch, error)
    q, k, v = inputs()
    with pytest.raises(torch.OutOfMemoryError):
        attend(q, k, v)
    assert select_implementation(q) == ("triton", None)


@pytest.mark.parametrize("error", (ImportError("libtriton.so: undefined symbol"), OSError("DLL load failed"),
                                   AttributeError("module 'triton' has no attribute 'language'")), ids=str)
def test_triton_that_cannot_be_imported(error, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.endswith("._triton.pipeline"):
                raise error

    package = dispatch.__package__
    for name in [name for name in sys.modules if name.startswith(f"{package}._triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules[package], "_triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    q, k, v = inputs()
    with pytest.raises(FastPathError, match="importing Triton failed.*pip install triton"):
        attend(q, k, v, impl="triton")
    assert torch.equal(attend(q, k, v), attend(q, k, v, impl="reference"))


def test_a_given_map_is_not_given_to_other_blocks(monkeypatch):
    """The caller made it for the fast kernels' blocks."""
    from comfyui_spargeattn.kernels import BlockShape, block_sparse_attention
    kernels_that(monkeypatch, RuntimeError("Failed to find C compiler"))
    pipeline = dispatch._pipeline()
    pipeline.block_of = lambda q, pv_dtype: BlockShape(20, 20)
    monkeypatch.setattr(dispatch, "_pipeline", lambda: pipeline)
    with pytest.raises(FastPathError):
        block_sparse_attention(*inputs(), torch.ones(1, 1, 2, 2, dtype=torch.bool))


def test_gradients_are_tracked_by_neither():
    q, k, v = (x.requires_grad_() for x in inputs())
    assert not attend(q, k, v, impl="reference").requires_grad
    assert q.grad is None and q.requires_grad

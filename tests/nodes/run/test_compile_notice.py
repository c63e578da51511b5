"""The line that a user reads while kernels are compiled."""
import contextvars
import time

from comfyui_spargeattn.nodes.run import compile_notice as compilation
from comfyui_spargeattn.nodes.run.compile_notice import announced


def test_first_slow_call_of_a_kind_is_announced_once(monkeypatch):
    monkeypatch.setattr(compilation, "PATIENCE", 0.05)
    monkeypatch.setattr(compilation, "_started", set())
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    node = contextvars.ContextVar("node")
    node.set("sampler")
    said = []
    for kind in ("a", "a", "b"):
        with announced(kind, lambda message, kind=kind: said.append((kind, message, node.get()))):
            time.sleep(0.4)
    assert [(kind, at) for kind, _, at in said] == [("a", "sampler")] * 2 + [("b", "sampler")] * 2
    assert "kept in /somewhere" in said[0][1] and "ready after 0 s" in said[1][1]


def test_quick_calls_say_nothing(monkeypatch):
    monkeypatch.setattr(compilation, "_started", set())
    said = []
    with announced("quick", said.append):
        pass
    time.sleep(0.05)
    assert not said

"""Tokens that stay exact however few blocks are kept: text, sound and pictures of MiniMax-H3."""
import checkpoints
import comfy_host
import pytest
import torch
from sampling import apply, condition, sample

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

SLOT = "optimized_attention_override"
FEW = {"selection": "topk", "keep_percent": 5.0, "similarity_threshold": -1.0}
FAMILY = checkpoints.FAMILIES["minimax_h3"]
REFERENCES = [{"kind": "image", "latent_h": 16, "latent_w": 16, "latent": torch.ones(1, 24, 1, 16, 16)},
              {"kind": "video", "latent_t": 2, "latent_h": 32, "latent_w": 32, "ref_audio_t": 0,
               "latent": torch.ones(1, 24, 2, 32, 32)}]
TEXT, PICTURE, CLIP, SOUND = 48, 64, 512, 30


@pytest.fixture(scope="module")
def model(comfy_nodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "minimax.safetensors"
    checkpoints.write(FAMILY, path)
    return checkpoints.load(FAMILY, path, None)


class Compared:
    """An override that computes every long call twice; `errors`: relative, of each query (tokens,), a call."""

    def __init__(self, override):
        self.override, self.errors = override, []

    def container_function(self, *args, **kwargs):
        from comfy.ldm.modules.attention import attention_pytorch

        qkv = [container.peek().clone() for container in args[:3]]
        out = self.override.container_function(*args, **kwargs)
        dense = attention_pytorch(*qkv, *args[3:], **{**kwargs, "transformer_options": {}})
        self.errors.append(((out - dense).norm(dim=-1) / dense.norm(dim=-1))[0])
        return out


@pytest.mark.parametrize("widgets, steps", (({"hilbert": "off"}, 1), ({"hilbert": "on"}, 1), ({"refreshes": 2}, 16)))
def test_rows_before_the_video(comfy_nodes, model, widgets, steps):
    patched = apply(comfy_nodes, model, selection=FEW, **widgets)
    options = patched.model_options["transformer_options"]
    compared = options[SLOT] = Compared(options[SLOT])
    positive = condition(FAMILY)
    positive[0][1]["minimax_refs"] = REFERENCES
    sample(patched, FAMILY, steps=steps, positive=positive)
    assert len(compared.errors) == steps * FAMILY.calls
    bound, sparse = 1e-4 if not torch.cuda.is_available() else 0.1, 0
    for error in compared.errors:
        text_and_picture, clip, sound, video = error.split([TEXT + PICTURE, CLIP, SOUND, FAMILY.tokens - TEXT - SOUND])
        assert text_and_picture.max() < bound and sound.max() < bound
        # Their blocks in the middle hold no others.
        sparse += bool(clip[128:-128].median() > 10 * bound and video[128:-128].median() > 10 * bound)
    assert sparse == (steps - widgets.get("refreshes", 0)) * FAMILY.calls  # a refresh is exact everywhere


def test_refreshes_read_tensors_that_nobody_has_overwritten(comfy_nodes, model, monkeypatch):
    """A backend that takes containers may do what it likes with the tensors in them."""
    module = comfy_host.pack_module(comfy_nodes, "nodes.run.kernel_calls")
    seen, residual = [], module.attention_residual

    def record(q, k, v, dense, **how):
        seen.append(bool(q.any() and k.any() and v.any()))
        return residual(q, k, v, dense, **how)

    class Spoiler:
        def __call__(self, func, *args, **kwargs):
            return func(*args, **kwargs)

        def container_function(self, q, k, v, *args, **kwargs):
            from comfy.ldm.modules.attention import attention_pytorch

            out = attention_pytorch(q.peek(), k.peek(), v.peek(), *args, **kwargs)
            for container in (q, k, v):
                container.take().zero_()
            return out

    monkeypatch.setattr(module, "attention_residual", record)
    below = model.clone()
    below.model_options["transformer_options"][SLOT] = Spoiler()
    patched = apply(comfy_nodes, below, selection=FEW, refreshes=2)
    latent = sample(patched, FAMILY, steps=6)
    summary = patched.model_options["transformer_options"][SLOT].run.summary
    assert latent.isfinite().all()
    assert seen == [True] * 2 * FAMILY.calls and "added to 8 sparse calls" in summary.residuals

"""The way into a call: one look at numbers of tokens, more only where they leave it open."""
import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call import entry
from comfyui_spargeattn.nodes.call.arguments import AttentionCall, token_counts
from comfyui_spargeattn.nodes.call.layer_names import LayerNames
from comfyui_spargeattn.nodes.call.plan import Dense, NodeSettings, SparsePlan, plan_call
from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock
from comfyui_spargeattn.tests.nodes.stand_ins import Container

HEADS, DIM = 2, 8
SETTINGS = NodeSettings(SpargeParams(topk=0.5, similarity_threshold=-1.0), start_percent=0.0, min_tokens=64)


def flat(tokens):
    return torch.zeros(1, tokens, HEADS * DIM)


def split(tokens):
    return torch.zeros(1, HEADS, tokens, DIM)


USUAL = {"B L HD": (flat, {}), "B H L D": (split, {"skip_reshape": True}),
         "B L HD to B H L D": (flat, {"skip_reshape": False, "skip_output_reshape": True})}


@pytest.mark.parametrize("tokens, keys", ((70, 70), (70, 5), (10, 10)))
@pytest.mark.parametrize("form", USUAL)
def test_a_glance_sees_what_reading_does(form, tokens, keys):
    make, kwargs = USUAL[form]
    args = make(tokens), make(keys), make(keys), HEADS
    call = AttentionCall.parse(args, kwargs)
    assert token_counts(args, kwargs) == (call.q_tokens, call.k_tokens) == (tokens, keys)
    found = entry.enter(args, kwargs, SETTINGS, LayerNames())
    assert str(found.plan) == str(plan_call(call, SETTINGS))
    assert isinstance(found.plan, SparsePlan) == (tokens == keys == 70) == (found.call is not None)


def test_a_glance_is_not_enough():
    x, y = flat(70), split(70)
    for args, kwargs in [((Container(x),) * 3, {}), ((x, x, x, HEADS, None, None, False), {}), ((x,), {}),
                         ((x, y, y, HEADS), {}), ((x, x, x, HEADS), {"skip_reshape": True}), ((y, y, y, HEADS), {}),
                         ((torch.nn.Parameter(x), x, x, HEADS), {}), ((), {"q": x, "k": x, "v": x, "heads": HEADS})]:
        assert token_counts(args, kwargs) is None


def test_calls_that_stay_dense_are_not_read(monkeypatch):
    monkeypatch.setattr(entry.AttentionCall, "parse", lambda *args: pytest.fail("it was read"))
    for tokens, keys, reason in ((70, 5, "cross-attention"), (10, 10, "fewer tokens than min_tokens")):
        found = entry.enter((flat(tokens), flat(keys), flat(keys), HEADS), {}, SETTINGS, LayerNames())
        assert isinstance(found.plan, Dense) and found.plan.reason == reason and found.call is None


def test_layers_are_counted_whatever_becomes_of_them():
    """A short call has a name, and cross-attention none."""
    names, layers = LayerNames(), []

    def model(x, t, c_concat, c_crossattn, control, options, **conds):
        for tokens, keys in ((10, 10), (70, 5), (70, 70)):
            args, kwargs = (flat(tokens), flat(keys), flat(keys), HEADS), {"transformer_options": options}
            layers.append(entry.enter(args, kwargs, SETTINGS, names).site.layer)

    names.count(model, None, None, transformer_options={"block_index": 3})
    assert layers == ["3", None, "3#2"] and names.blocks == {TransformerBlock("", 3)}


def test_arguments_that_are_not_understood():
    found = entry.enter((flat(70),) * 3, {}, SETTINGS, LayerNames())
    assert found.call is None and str(found.plan) == "unsupported call (no argument 'heads')"

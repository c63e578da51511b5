"""Which calls of a refresh are kept for a search, and which call gets which."""
from types import SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.measure import RefreshedCall
from comfyui_spargeattn.nodes.call.plan import CallSite
from comfyui_spargeattn.nodes.run.refreshed_calls import SHARE, RefreshedCalls

HEADS, TOKENS, DIM = 2, 10, 8
BYTES = 4 * 4 * HEADS * TOKENS * DIM  # q, k, v and the result in float32


def call(value=0.0, condition="positive", layout="BNHD", tokens=TOKENS, window=None):
    shape = (1, tokens, HEADS, DIM) if layout == "BNHD" else (1, HEADS, tokens, DIM)
    options = {"uuids": [condition]}
    if window is not None:
        options["context_window"] = SimpleNamespace(index_list=window)
    return AttentionCall(*(torch.full(shape, value + i) for i in range(3)), layout, transformer_options=options)


def site(layer=0, doubt=""):
    return CallSite(layer=f"#{layer}", doubt=doubt)


def store(calls=100):
    return RefreshedCalls(lambda device: int(calls * BYTES / SHARE))


def refresh(kept, layers, value=0.0, lead=0.0):
    kept.begin(lead)
    for layer in range(layers):
        made = call(value + layer)
        kept.keep(made, site(layer), made.give_back(made.q + 9))


def known(kept, layers):
    """The layers whose call is kept."""
    return [layer for layer in range(layers) if isinstance(kept.get(call(), site(layer)), RefreshedCall)]


@pytest.mark.parametrize("layout", ("BNHD", "BHND"))
def test_each_layer_gets_its_own_call_of_the_last_refresh(layout):
    kept = store()
    for value in (10.0, 20.0):
        kept.begin()
        for layer in range(3):
            made = call(value + layer, layout=layout)
            dense = made.q + 9
            kept.keep(made, site(layer), made.give_back(dense))
            for x in (made.q, dense):
                x.fill_(-1.0)  # as a model does that reuses its memory
    for layer in range(3):
        found, dense = kept.get(call(layout=layout), site(layer))[:2]
        assert [x.mean().item() for x in (found.q, found.k, found.v, dense)] == [20 + layer + i for i in (0, 1, 2, 9)]
        assert found.q.shape == dense.shape == call(layout=layout).q.shape and found.layout == layout
    kept.clear()
    assert known(kept, 3) == []


@pytest.mark.parametrize("other, place", [
    (call(condition="negative"), site()), (call(), site(1)), (call(tokens=TOKENS + 1), site()),
    (call(window=[0, 1]), site()), (call(), site(doubt="layers were left out")), (call(), CallSite(layer=None)),
], ids=("condition", "layer", "tokens", "window", "doubt", "no layer"))
def test_nothing_for_what_is_not_the_same(other, place):
    kept = store()
    refresh(kept, 1)
    assert "can't be told" in kept.get(other, place) and known(kept, 1) == [0]


def test_the_same_twice_in_one_evaluation_is_never_used():
    """Tiles of a picture come one after another with the same condition and shape."""
    kept = store()
    refresh(kept, 2)
    kept.keep(call(), site(1), call().give_back(call().q))
    assert known(kept, 2) == [0] and "can't be told" in kept.get(call(), site(1))
    refresh(kept, 2)
    assert known(kept, 2) == [0]


def test_where_memory_is_short_layers_take_turns():
    kept, seen = store(calls=2), []
    for _ in range(4):
        refresh(kept, 5)
        seen.append(known(kept, 5))
        assert all("take turns" in kept.get(call(), site(layer)) for layer in range(5) if layer not in seen[-1])
    assert seen == [[0, 1], [2, 3], [4], [0, 1]]


def limited(calls):
    """A store with memory for so many calls altogether."""
    store = RefreshedCalls(lambda device: int(calls * BYTES / SHARE) - BYTES * len(store._earlier))
    return store


def extrapolated(kept, layers):
    """(value of the earlier call or None, lead) of each layer."""
    found = [kept.get(call(), site(layer)) for layer in range(layers)]
    return [(before and before.call.q.mean().item(), lead) for _, _, before, lead in found]


def test_the_refresh_before_comes_with_it_where_residuals_are_extrapolated():
    kept = limited(100)
    for value, lead in ((10.0, 0.0), (20.0, 0.5), (30.0, 0.25)):
        refresh(kept, 2, value, lead)
    assert extrapolated(kept, 2) == [(20.0, 0.25), (21.0, 0.25)]
    assert kept.get(call(), site(0)).earlier.dense.mean() == 29.0
    assert kept.get(call(), site(0)).earlier.earlier is None
    refresh(kept, 2, 40.0)
    assert extrapolated(kept, 2) == [(None, 0.0)] * 2


def test_the_refresh_before_gives_way_where_memory_is_short():
    kept = limited(5)
    for value in (10.0, 20.0, 30.0):
        refresh(kept, 3, value, 0.5)
        assert known(kept, 3) == [0, 1, 2]
    assert extrapolated(kept, 3) == [(20.0, 0.5), (21.0, 0.5), (None, 0.0)]
    kept, seen = limited(2), []
    for _ in range(4):
        refresh(kept, 5, lead=0.5)
        seen.append(known(kept, 5))
    assert seen == [[0, 1], [2, 3], [4], [0, 1]]


def test_a_result_of_another_shape_is_not_kept():
    kept = store()
    kept.begin()
    kept.keep(call(), site(), torch.zeros(1, TOKENS, 1))
    assert known(kept, 1) == []

"""Entries share residuals, and the sums of their memory are those that a count over all of them gives."""
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_spargeattn.kernels import Residual
from comfyui_spargeattn.nodes.run.residual_entries import Entry, ResidualEntries

DEVICE = torch.device("cpu")
KEYS = st.lists(st.integers(0, 5), unique=True, max_size=3)
ACTIONS = st.lists(st.one_of(st.tuples(st.just("put"), KEYS, st.integers(1, 3), st.booleans()),
                             st.tuples(st.just("drop"), KEYS), st.tuples(st.just("keep only"), st.integers(0, 9))),
                   max_size=12)


def counted(held, on_host, without=()):
    """Memory of the residuals in {key: (residual, evaluation, on_host)}."""
    wholes = {id(whole): whole for key, (whole, _, there) in held.items() if there == on_host and key not in without}
    return sum(whole.bytes for whole in wholes.values())


@given(actions=ACTIONS, without=KEYS)
def test_memory(actions, without):
    entries, held = ResidualEntries(), {}
    for evaluation, (action, *more) in enumerate(actions):
        if action == "put":
            keys, tokens, on_host = more
            whole = Residual.empty((1, 1, tokens, 4), DEVICE)
            for key in keys:
                entries.put(key, Entry(whole, 0, 1, evaluation, on_host))
                held[key] = whole, evaluation, on_host
        elif action == "drop":
            entries.drop(more[0])
            held = {key: kept for key, kept in held.items() if key not in more[0]}
        else:
            entries.keep_only(more[0])
            held = {key: kept for key, kept in held.items() if kept[1] == more[0]}
        for device, on_host in ((DEVICE, False), (None, True)):
            assert entries.bytes(device) == counted(held, on_host)
            assert entries.bytes(device, without) == counted(held, on_host, without)
    assert {id(entry.whole) for entry in entries} == {id(whole) for whole, *_ in held.values()}


def test_order_and_absence():
    entries, whole = ResidualEntries(), Residual.empty((2, 1, 3, 4), DEVICE)
    first, second = (Entry(whole, i, i + 1, 0, False) for i in range(2))
    entries.put("a", first)
    entries.put("b", second)
    assert entries.of(("b", "c", "a")) == [second, first]
    assert entries.bytes(DEVICE) == whole.bytes == entries.bytes(DEVICE, ("a",)) and not entries.bytes(None)
    assert entries.bytes(DEVICE, ("a", "b")) == 0

"""Orders of sequences: what each curve means, the cache, and errors."""
import itertools
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_spargeattn.hilbert import CURVES, permutation, sequence_order
from comfyui_spargeattn.hilbert.permutation import OrderCache

GRIDS = [(1, 1, 1), (1, 5, 9), (2, 9, 11), (3, 4, 5), (5, 9, 6), (9, 8, 11)]


def sorted_tokens(grid, key):
    """Row-major indices of the tokens sorted by a key of (t, y, x)."""
    cells = list(itertools.product(*map(range, grid)))
    return sorted(range(len(cells)), key=lambda index: key(*cells[index]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("curve, key", [
    ("row-major", lambda t, y, x: (t, y, x)),
    ("time-major", lambda t, y, x: (y, x, t)),
])
def test_scans(grid, curve, key):
    assert sequence_order(grid, curve=curve).tolist() == sorted_tokens(grid, key)


@pytest.mark.parametrize("grid", GRIDS)
def test_blocked(grid):
    edge = 8 if grid[0] == 1 else 4
    expected = sorted_tokens(grid, lambda t, y, x: (t // edge, y // edge, x // edge, t, y, x))
    assert sequence_order(grid, curve="blocked").tolist() == expected


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.integers(0, 9), st.integers(0, 9), st.sampled_from(CURVES))
def test_sequences(grid, before, after, curve):
    order = sequence_order(grid, before=before, after=after, curve=curve)
    inside = math.prod(grid)
    total = before + inside + after
    assert order.dtype == torch.int32 and order.device.type == "cpu" and order.shape == (total,)
    assert torch.equal(order[:inside], sequence_order(grid, curve=curve) + before)
    assert order[inside:].tolist() == [*range(before), *range(total - after, total)]
    assert order.sort().values.tolist() == list(range(total))


def test_callers_cannot_change_what_is_cached():
    for before in (0, 1):
        expected = sequence_order((2, 3, 4), before=before).tolist()
        sequence_order((2, 3, 4), before=before).fill_(-1)
        assert sequence_order((2, 3, 4), before=before).tolist() == expected


def test_orders_built_in_inference_mode_serve_training(monkeypatch):
    monkeypatch.setattr(permutation, "_cache", OrderCache(1 << 22))
    with torch.inference_mode():
        sequence_order((3, 5, 7), after=2)
    x = torch.ones(107, requires_grad=True)
    x[sequence_order((3, 5, 7), after=2)].sum().backward()
    assert x.grad.eq(1).all()


def test_orders_follow_their_device_and_not_the_default_one():
    with torch.device("meta"):
        assert sequence_order((4, 4, 6)).tolist() == sequence_order((4, 4, 6)).tolist()
        assert sequence_order((4, 4, 6)).device.type == "cpu"
    assert sequence_order((4, 4, 6), device="meta").device.type == "meta"
    assert sequence_order((4, 4, 6)).device.type == "cpu"


def test_cache_drops_the_least_recently_used():
    cache, built = OrderCache(10), []

    def get(key, n):
        return cache.get(key, lambda: built.append(key) or torch.zeros(n))

    get("a", 4), get("b", 4), get("a", 4)
    assert built == ["a", "b"] and cache.elements == 8
    get("c", 4)
    assert cache.elements == 8
    get("a", 4), get("b", 4)
    assert built == ["a", "b", "c", "b"]
    assert get("too large", 11).shape == (11,) and cache.elements == 0


def test_cache_of_orders_stays_within_its_bound(monkeypatch):
    cache = OrderCache(1000)
    monkeypatch.setattr(permutation, "_cache", cache)
    for width in range(1, 40):
        sequence_order((2, 5, width), before=width)
        assert 0 < cache.elements <= 1000


def test_a_repeated_call_builds_nothing(monkeypatch):
    monkeypatch.setattr(permutation, "_cache", OrderCache(1 << 22))
    first = sequence_order((6, 7, 8), before=3)
    monkeypatch.setattr(permutation, "_CURVES", {})
    assert torch.equal(sequence_order([6, 7, 8], before=3), first)
    assert torch.equal(sequence_order((6, 7, 8), before=4)[:336], first[:336] + 1)  # another length of the text


def test_threads_get_the_same_orders(monkeypatch):
    calls, results = [], []
    build = permutation._CURVES["hilbert"]
    monkeypatch.setattr(permutation, "_cache", OrderCache(3000))
    monkeypatch.setitem(permutation._CURVES, "hilbert", lambda grid: calls.append(grid) or build(grid))
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        results.append(all(sequence_order(grid, before=seed % 2).numel() == math.prod(grid) + seed % 2
                           for grid in [(3, 8, 8), (5, 8, 8), (3, 8, 8)] * 5))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert sorted(calls) == [(3, 8, 8), (5, 8, 8)]  # each built once, however many ask at a time


@pytest.mark.parametrize("call, message", [
    (lambda: sequence_order((0, 2, 3)), r"grid must be three integers >= 1 .*got \(0, 2, 3\)"),
    (lambda: sequence_order((2, 3)), r"grid must be three integers >= 1 .*got \(2, 3\)"),
    (lambda: sequence_order((2, 3.0, 4)), r"grid must be three integers >= 1 .*got \(2, 3.0, 4\)"),
    (lambda: sequence_order(7), "grid must be three integers >= 1 .*got 7"),
    (lambda: sequence_order((1 << 11, 1 << 10, 1 << 10)), "grid must have at most 2147483647 tokens .*got 2147483648"),
    (lambda: sequence_order((2, 3, 4), curve="peano"), "curve must be one of hilbert, row-major, .*got 'peano'"),
    (lambda: sequence_order((2, 3, 4), curve=None), "curve must be one of .*got None"),
    (lambda: sequence_order((2, 3, 4), before=-1), "before must be an integer >= 0, got -1"),
    (lambda: sequence_order((2, 3, 4), after=1.5), "after must be an integer >= 0, got 1.5"),
    (lambda: sequence_order((2, 3, 4), after=(1 << 31) - 24), "before .* at most 2147483647 .*got 2147483648"),
])
def test_errors_name_argument_rule_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

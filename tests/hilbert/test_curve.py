"""The Hilbert order visits every token once and goes from neighbour to neighbour, whatever the size of the grid."""
import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_spargeattn.hilbert import CURVES, sequence_order
from comfyui_spargeattn.hilbert.curve import _Paths, hilbert_path


def coordinates(order, grid):
    """(3, tokens) of row-major indices."""
    _, height, width = grid
    order = order.long()
    return torch.stack([order // (height * width), order // width % height, order % width])


def assert_permutation(order, grid):
    assert order.dtype == torch.int32 and order.shape == (math.prod(grid),)
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid), dtype=torch.int32)), grid


def assert_unit_steps(path, grid):
    assert path.diff().abs().sum(0).eq(1).all(), f"a jump in {grid}"


def extents(order, grid, block):
    """(3, blocks): sizes of the boxes around runs of `block` tokens."""
    runs = coordinates(order, grid)[:, :len(order) // block * block].unflatten(1, (-1, block))
    return runs.amax(2) - runs.amin(2) + 1


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.tuples(*[st.integers(1, 48)] * 3).filter(lambda grid: math.prod(grid) <= 40_000))
def test_random_grids(grid):
    order = sequence_order(grid)
    assert_permutation(order, grid)
    assert_unit_steps(coordinates(order, grid), grid)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.permutations([1, 2, 3]), st.integers(1, 3), st.integers(1, 3000))
def test_flat_and_long_grids(axes, width, length):
    grid = [0, 0, 0]
    for axis, n in zip(axes, (1, width, length)):
        grid[axis - 1] = n
    order = sequence_order(grid)
    assert_permutation(order, grid)
    assert_unit_steps(coordinates(order, grid), grid)


def test_every_way_into_a_core_and_remainders():
    """Sizes that are 1, odd, even or multiples of the cell edge, with a remainder that is 1, odd or even.

    The edge is 8 if a size is 1 or 2, and 4 otherwise.
    """
    flat = (grid for grid in itertools.product((1, 2, 3, 4, 9, 10, 11, 16), repeat=3) if min(grid) <= 2)
    for grid in itertools.chain(itertools.product(range(3, 9), repeat=3), flat):
        order = sequence_order(grid)
        assert_permutation(order, grid)
        assert_unit_steps(coordinates(order, grid), grid)


def test_all_pairs_of_corners_of_the_right_parity_are_joined():
    """Sizes of 1 to 7 stand for all: from 4 on, the parts of a middle cut exceed 1, and their parities repeat."""
    paths, joined = _Paths(), 0
    for dims in itertools.combinations_with_replacement(range(1, 8), 3):
        for flips in itertools.product((0, 1), repeat=3):
            last = [(n - 1) * flip for n, flip in zip(dims, flips)]
            steps = math.prod(dims) - 1
            is_a_flip = all(n > 1 for n, flip in zip(dims, flips) if flip)
            if not is_a_flip or (steps - sum(last)) % 2 or (steps > 0 and sum(last) == 0):
                continue
            path = paths._path(dims, flips)
            cells = (path[0] * dims[1] + path[1]) * dims[2] + path[2]
            assert cells.sort().values.tolist() == list(range(steps + 1))
            assert path[:, 0].tolist() == [0, 0, 0] and path[:, -1].tolist() == last
            assert_unit_steps(path, dims)
            joined += 1
    assert joined > 300


def test_a_line_is_visited_from_end_to_end():
    for grid in [(7, 1, 1), (1, 8, 1), (1, 1, 9)]:
        assert sequence_order(grid).tolist() in (list(range(max(grid))), list(range(max(grid)))[::-1])
    assert sequence_order((1, 1, 1)).tolist() == [0]


def test_is_hilberts_square():
    """On 2^k × 2^k, every aligned run of 4^j tokens fills a square."""
    order = sequence_order((1, 64, 64))
    for j in range(7):
        assert extents(order, (1, 64, 64), 4**j).tolist() == [[1] * 4**(6 - j)] + [[2**j] * 4**(6 - j)] * 2


def test_is_hilberts_cube():
    order = sequence_order((32, 32, 32))
    for j in range(6):
        assert extents(order, (32, 32, 32), 8**j).eq(2**j).all()


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.tuples(*[st.integers(1, 9)] * 3))
def test_runs_of_64_fill_boxes_of_multiples_of_4(cells):
    grid = tuple(4 * n for n in cells)
    assert extents(sequence_order(grid), grid, 64).prod(0).eq(64).all()


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(st.integers(1, 16), st.integers(1, 16))
def test_runs_of_64_fill_boxes_of_a_frame_of_multiples_of_8(height, width):
    grid = 1, 8 * height, 8 * width
    assert extents(sequence_order(grid), grid, 64).prod(0).eq(64).all()


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_runs_of_128_fill_boxes_of_two_frames_of_multiples_of_8(height, width):
    """Blocks of 128 queries fill boxes too; cells of 4 × 4 would cut them."""
    grid = 2, 8 * height, 8 * width
    assert extents(sequence_order(grid), grid, 128).prod(0).eq(128).all()


@pytest.mark.parametrize("grid", [(21, 30, 52), (28, 30, 26), (33, 45, 37), (21, 45, 80), (1, 45, 80)])
def test_is_more_compact_than_the_scans(grid):
    """Compare the mean surface of the boxes around runs of 64 tokens. Odd sizes add at most a tenth to the volume."""
    surface = {}
    for curve in CURVES:
        t, y, x = extents(sequence_order(grid, curve=curve), grid, 64).double()
        surface[curve] = (t * y + y * x + x * t).mean()
    assert surface["hilbert"] < 0.6 * min(surface[name] for name in ("row-major", "time-major"))
    assert extents(sequence_order(grid), grid, 64).double().prod(0).mean() < 1.1 * 64


@pytest.mark.parametrize("grid", [(101, 99, 101), (1, 1001, 999)])
def test_a_million_tokens_take_little_time_on_one_core(grid):
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            start = time.perf_counter()
            hilbert_path(grid)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 2

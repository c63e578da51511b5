"""The window of steps that may go sparse, and how often it reads the noise level."""
from functools import partial
from itertools import pairwise

import pytest
import torch

from comfyui_spargeattn.nodes.run.sigma_window import SigmaWindow


def flow(percent):
    """percent_to_sigma of a flow model without shift."""
    return 1.0 - percent


def follow(window, sigmas, schedule=None):
    """(inside at each evaluation, number of reads)."""
    reads = []

    def read(sigma):
        reads.append(sigma)
        return sigma

    window.begin(flow, sigmas if schedule is None else schedule)
    inside = []
    for sigma in sigmas:
        window.advance(partial(read, sigma))
        inside.append(window.inside)
    return inside, len(reads)


TEN_STEPS = torch.linspace(1, 0, 11).tolist()[:-1]  # float32 values, as a sampler has them


@pytest.mark.parametrize("start, end, first, last, reads", (
    (0.0, 1.0, 0, 9, 0),
    (0.2, 1.0, 2, 9, 1),  # settled before the window by the schedule, inside it for good
    (0.25, 1.0, 3, 9, 1),
    (0.0, 0.5, 0, 5, 10),
    (0.2, 0.5, 2, 5, 8),
    (1.0, 1.0, None, None, 0),
))
def test_window(start, end, first, last, reads):
    expected = [first is not None and first <= i <= last for i in range(10)]
    assert follow(SigmaWindow(start, end), TEN_STEPS) == (expected, reads)


def test_window_of_a_sampler_that_evaluates_twice_a_step():
    sigmas = [sigma for pair in pairwise(TEN_STEPS) for sigma in pair]
    inside, _ = follow(SigmaWindow(0.3, 1.0), sigmas, TEN_STEPS)
    assert inside == [sigma <= 0.7 + 1e-6 for sigma in sigmas]


def test_window_of_a_schedule_that_rises_is_read_each_time():
    sigmas = TEN_STEPS[::-1]
    assert follow(SigmaWindow(0.3, 1.0), sigmas) == ([sigma <= 0.7 + 1e-6 for sigma in sigmas], 10)


def test_window_of_a_schedule_that_falls_and_rises():
    """A sampler that restarts from more noise leaves the window again."""
    sigmas = [1.0, 0.6, 0.4, 0.9, 0.5, 0.1]
    assert follow(SigmaWindow(0.3, 1.0), sigmas)[0] == [False, True, True, False, True, True]


def test_window_outside_a_run():
    assert SigmaWindow(0.0, 1.0).inside
    for bounded in (SigmaWindow(0.1, 1.0), SigmaWindow(0.0, 0.9)):
        assert not bounded.inside
        follow(bounded, TEN_STEPS)
        bounded.reset()
        assert not bounded.inside

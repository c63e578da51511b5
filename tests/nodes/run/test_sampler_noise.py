"""Which samplers add noise between steps, by the signatures of their functions."""
from functools import partial
from types import SimpleNamespace

import pytest

from comfyui_spargeattn.nodes.run.sampler_noise import adds_noise


def steady(model, x, sigmas, s_churn=0.0, s_noise=1.0):
    ...


def ancestral(model, x, sigmas, eta=1.0, s_noise=1.0, noise_sampler=None):
    ...


def sample_res_multistep(model, x, sigmas, s_noise=1.0, noise_sampler=None):
    ...


def of_another_pack(model, x, sigmas, eta=0.5, noise_sampler_type="gaussian"):
    ...


@pytest.mark.parametrize("function, options, expected", [
    (steady, {}, False),
    (steady, {"s_churn": 0.0}, False),
    (steady, {"s_churn": 5.0}, True),
    (ancestral, {}, True),
    (ancestral, {"eta": 0.0}, False),
    (ancestral, {"s_noise": 0.0}, False),
    (ancestral, {"eta": None}, True),
    (partial(ancestral, eta=0.0), {}, False),
    (lambda model, x, sigmas, noise_sampler=None: None, {}, True),
    (sample_res_multistep, {}, False),
    (of_another_pack, {}, True),
    (of_another_pack, {"eta": 0.0}, False),
])
def test_adds_noise(function, options, expected):
    assert adds_noise(SimpleNamespace(sampler_function=function, extra_options=options)) is expected


def test_what_is_not_known_counts_as_adding_noise():
    assert adds_noise(None) and adds_noise(object())
    assert not adds_noise(SimpleNamespace(sampler_function=steady))

"""The search for thresholds, on layers whose optimum is known because it was planted."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.tuned.candidates import AMOUNTS, CANDIDATES, PV_THRESHOLDS, SEARCHED_CURVES
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch, Measured, bisect
from comfyui_spargeattn.tests.nodes.tuned.planted import BOUNDS, least_amount, planted


@pytest.mark.parametrize("selection", AMOUNTS)
@pytest.mark.parametrize("skipped", ("drop", "pooled"))
def test_finds_the_planted_amount_of_each_head(selection, skipped):
    needs = [0.35, 0.5, 0.8]
    found = LayerSearch.start(3, 3, BOUNDS).learn(planted(needs, selection=selection, skipped=skipped))
    assert (found.setting.params.selection, found.setting.skipped) == (selection, skipped)
    expected = [least_amount(selection, need) for need in needs]
    assert found.setting.params.amount.tolist() == pytest.approx(expected)
    assert found.sparsity.tolist() == pytest.approx([1 - x for x in expected], abs=1e-5)
    assert found.setting.curves == ("row-major",) * 3
    assert (found.error <= BOUNDS.l2).all() and found.calls == 1


def test_each_head_of_k_gets_its_own_order():
    curves = ("hilbert", "row-major", "time-major", "blocked")
    found = LayerSearch.start(4, 4, BOUNDS).learn(planted([0.4, 0.5, 0.6, 0.7], curves=curves))
    assert found.setting.curves == curves


def test_heads_that_share_a_head_of_k_share_its_order():
    curves = ("hilbert", "blocked")
    found = LayerSearch.start(6, 2, BOUNDS).learn(planted([0.4] * 6, curves=curves))
    assert found.setting.curves == curves
    assert found.setting.params.heads == 6


def test_heads_of_a_group_get_what_was_found_in_their_own_order():
    """Three heads for each of two heads of K, whose good orders and needs all differ."""
    curves, needs = ("hilbert", "blocked"), [0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
    found = LayerSearch.start(6, 2, BOUNDS).learn(planted(needs, curves=curves))
    assert found.setting.params.amount.tolist() == pytest.approx([least_amount("cdf", x) for x in needs])
    assert found.sparsity.tolist() == pytest.approx([1 - least_amount("cdf", x) for x in needs], abs=1e-5)


def test_heads_that_gain_too_little_keep_every_block():
    found = LayerSearch.start(2, 2, Bounds(0.05, 0.06, min_gain=0.25)).learn(planted([0.4, 0.85], pv_needs=3.0))
    assert found.setting.dense_heads.tolist() == [False, True]
    assert found.setting.params.pv_threshold[0] == PV_THRESHOLDS[0]
    assert found.setting.params.pv_threshold[1] == math.inf
    assert found.setting.params.similarity_threshold[1] == -1
    assert found.sparsity[1] == 0


def test_a_layer_without_gain_stays_dense():
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([1.0, 1.0]))
    assert found.setting is None and found.sparsity.tolist() == [0, 0]


def test_a_layer_that_is_far_from_dense_with_every_block_stays_dense():
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.4], floor=0.1))
    assert found.setting is None


def test_the_format_that_holds_the_bound_is_chosen_and_the_cheaper_one_where_both_do():
    assert LayerSearch.start(1, 1, BOUNDS).learn(planted([0.4], pv_dtype="int8")).setting.pv_dtype == "int8"
    assert LayerSearch.start(1, 1, BOUNDS).learn(planted([0.4], pv_dtype="fp16")).setting.pv_dtype == "fp16"

    def either(setting):
        return Measured((setting.params.amount < 0.5).float(), setting.params.amount)
    assert LayerSearch.start(1, 1, BOUNDS).learn(either).setting.pv_dtype == "int8"


def test_pv_threshold_is_the_least_that_holds_l2():
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.4], pv_needs=torch.tensor([9.5, math.inf])))
    assert found.setting.params.pv_threshold.tolist() == [10.0, math.inf]
    assert (found.error <= BOUNDS.l2).all()


def test_equal_bounds_leave_the_pv_threshold_off():
    found = LayerSearch.start(2, 2, Bounds(0.05, 0.05)).learn(planted([0.4, 0.5]))
    assert found.setting.params.pv_threshold == math.inf


def test_what_a_call_cannot_run_is_never_chosen():
    """No grid in this call, so that only row-major can be measured."""
    inner = planted([0.4], curves=("hilbert",))
    start = LayerSearch.start(1, 1, BOUNDS)
    found = start.learn(inner)
    assert found.setting.curves == ("hilbert",)
    assert found.learn(lambda setting: inner(setting) if setting.curves == ("row-major",) else None).setting is None


def test_the_strictest_call_wins_whatever_the_order():
    calls = [planted([0.35, 0.7]), planted([0.5, 0.4]), planted([0.4, 0.6])]
    forwards = backwards = LayerSearch.start(2, 2, BOUNDS)
    for call in calls:
        forwards = forwards.learn(call)
    for call in reversed(calls):
        backwards = backwards.learn(call)
    expected = [least_amount("cdf", 0.5), least_amount("cdf", 0.7)]
    assert forwards.setting.params.amount.tolist() == pytest.approx(expected)
    assert torch.equal(forwards.levels, backwards.levels)
    assert forwards.calls == 3
    assert (calls[0](forwards.setting).error <= BOUNDS.l2).all()


def test_deterministic():
    one, two = (LayerSearch.start(3, 3, BOUNDS).learn(planted([0.3, 0.5, 0.9])) for _ in range(2))
    assert torch.equal(one.levels, two.levels) and torch.equal(one.kept, two.kept)
    assert one.setting.curves == two.setting.curves


def test_later_calls_cost_a_fraction_of_the_first():
    first, second = [], []
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.6], calls=first))
    found.learn(planted([0.4, 0.6], calls=second))
    assert len(first) <= 6 * len(CANDIDATES) + 8
    assert len(second) <= 1.2 * len(CANDIDATES)


def test_an_interrupted_call_changes_nothing():
    start = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.6]))
    before = start.levels.clone()
    inner, count = planted([0.9, 0.9]), iter(range(40))

    def stop(setting):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return inner(setting)

    with pytest.raises(KeyboardInterrupt):
        start.learn(stop)
    assert torch.equal(start.levels, before) and start.calls == 1


def test_kept_of_earlier_calls_grows_with_the_amount():
    """The first call kept 0.3 at its amount; the second needs an amount that keeps twice as much here."""
    start = LayerSearch.start(1, 1, BOUNDS).learn(planted([0.3], kept_of=lambda a: 0.3 * torch.ones_like(a)))
    found = start.learn(planted([0.6], kept_of=lambda a: torch.where(a > 0.5, 0.4, 0.2)))
    assert found.sparsity.item() == pytest.approx(1 - (0.3 * 2 + 0.4) / 2)


def test_evaluation_reports_the_error_and_leaves_the_setting():
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.6]))
    seen = found.evaluate(planted([0.4, 0.9]))
    assert seen.setting is found.setting and seen.unseen_calls == 1
    assert seen.unseen.tolist() == pytest.approx([0.04, 0.2])
    assert seen.learn(planted([0.4, 0.9])).unseen_calls == 0


def test_evaluation_keeps_the_largest_error_of_all_its_calls():
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.6]))
    for needs in ([0.4, 0.9], [0.9, 0.6], [0.4, 0.6]):
        found = found.evaluate(planted(needs))
    assert found.unseen.tolist() == pytest.approx([0.2, 0.2]) and found.unseen_calls == 3


def test_bisection_returns_measured_levels_only():
    """Errors that do not fall steadily, and NaN: what is returned held the bound when it was measured."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(40, 32, generator=generator)
    errors[torch.rand(40, 32, generator=generator) < 0.1] = math.nan
    every = torch.arange(40)
    tried = torch.zeros(40, 32, dtype=torch.bool)

    def measure(level):
        tried[every, level.clamp(max=31)] = True
        return Measured(errors[every, level.clamp(max=31)], torch.ones(40))

    level, _, _ = bisect(measure, torch.zeros(40, dtype=torch.long), 32, 0.5)
    found = level < 32
    assert found.any()
    assert tried[every[found], level[found]].all() and (errors[every[found], level[found]] <= 0.5).all()


@pytest.mark.parametrize("values", (dict(l1=0.0), dict(l1=0.07, l2=0.06), dict(l2=1.0), dict(min_gain=1.0),
                                    dict(l1=math.nan), dict(min_gain=-0.1)), ids=str)
def test_bounds_are_checked(values):
    with pytest.raises(ValueError, match="min_gain" if "min_gain" in values else "l1"):
        Bounds(**values)


def test_amounts_are_thresholds_from_aggressive_to_everything():
    for selection, amounts in AMOUNTS.items():
        assert list(amounts) == sorted(set(amounts)) and amounts[-1] == 1
        SpargeParams(**{"cdf_threshold" if selection == "cdf" else "topk": torch.tensor(amounts)})
    assert list(PV_THRESHOLDS) == sorted(PV_THRESHOLDS) and PV_THRESHOLDS[-1] == math.inf
    assert {candidate.curve for candidate in CANDIDATES} == set(SEARCHED_CURVES)

"""The search for thresholds, on layers whose optimum is known because it was planted."""
import math
import zlib
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.kernels.search import (
    AMOUNTS,
    CURVES,
    PV_THRESHOLDS,
    RULES,
    Bounds,
    LayerSearch,
    Measured,
    Setting,
    bisect,
)

BOUNDS = Bounds(0.05, 0.06)


def planted(needs, *, curves=("row-major",), skipped="drop", pv_dtype="fp16", selection="cdf", floor=0.0,
            pv_needs=math.inf, kept_of=lambda amount: amount, calls=None):
    """A layer whose heads hold 0.05 from the amount `needs` (H,) on, in these choices alone; others need every block.

    curves: the good one of each head of K. floor: error with every block. pv_needs: least P·V threshold that holds.
    """
    needs = torch.tensor(needs)
    heads = len(needs)

    def measure(setting: Setting) -> Measured:
        if calls is not None:
            calls.append(setting)
        amount, pv = setting.params.amount, torch.as_tensor(setting.params.pv_threshold)
        good = torch.tensor([a == b for a, b in zip(setting.curves, curves * (len(setting.curves) // len(curves)))])
        good = good.repeat_interleave(heads // len(setting.curves))
        good &= setting.skipped == skipped and setting.params.selection == selection
        if pv_dtype != setting.pv_dtype:
            floor_here = 1.0
        else:
            floor_here = floor
        least = torch.where(good, needs, 1.0)
        error = floor_here + torch.where(amount >= least, 0.04, 0.2) * (amount < 1)
        error += torch.where(pv >= pv_needs, 0.0, 0.5)
        return Measured(error, torch.where(amount < 1, kept_of(amount), 1.0))

    return measure


def least_amount(selection, need):
    return min(a for a in AMOUNTS[selection] if a >= need)


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
    assert LayerSearch.start(1, 1, BOUNDS).learn(planted([0.4], pv_dtype="fp8")).setting.pv_dtype == "fp8"
    assert LayerSearch.start(1, 1, BOUNDS).learn(planted([0.4], pv_dtype="fp16")).setting.pv_dtype == "fp16"

    def either(setting):
        return Measured((setting.params.amount < 0.5).float(), setting.params.amount)
    assert LayerSearch.start(1, 1, BOUNDS).learn(either).setting.pv_dtype == "fp8"


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
    assert len(first) <= 6 * len(RULES) + 8
    assert len(second) <= 1.2 * len(RULES)


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


def by_rule(error_of, kept_of=lambda setting, amount: amount, shared=lambda setting, error: error):
    """A measure of two heads and more whose errors `error_of(curve, similarity, amount, head)` may be anything.

    shared: what becomes of the errors (H,) of heads that are measured together.
    """
    def measure(setting: Setting) -> Measured:
        amount, heads = setting.params.amount.tolist(), len(setting.params.amount)
        curves = [setting.curves[h // (heads // len(setting.curves))] for h in range(heads)]
        similarity = setting.params.similarity_threshold.tolist()
        error = torch.tensor([error_of(*x) for x in zip(curves, similarity, amount, range(heads))])
        return Measured(shared(setting, error), kept_of(setting, setting.params.amount))

    return measure


def test_an_order_holds_for_every_head_that_shares_it():
    """Head 0 gains most along the Hilbert curve, where head 1 exceeds the bound even with every block."""
    def error_of(curve, similarity, amount, head):
        if head == 1:
            return 0.2 if curve == "hilbert" else 0.04 if amount >= 0.7 else 0.3
        return 0.04 if amount >= (0.32 if curve == "hilbert" else 0.8) else 0.3

    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_rule(error_of))
    assert found.setting.curves == ("row-major",) and (found.error <= 0.05).all()
    assert found.setting.params.amount.tolist() == pytest.approx([least_amount("cdf", x) for x in (0.8, 0.7)])


def test_a_layer_stays_dense_where_no_order_holds_for_a_whole_group():
    """Each head holds in one order alone, another one each."""
    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_rule(
        lambda curve, similarity, amount, head: 0.04 if (curve, head) in (("hilbert", 0), ("blocked", 1)) else 0.2))
    assert found.setting is None and found.error.tolist() == [0, 0]


def test_heads_that_exceed_the_bound_together_keep_every_block():
    """Alone, each head holds at 0.4; head 1 does not beside heads in other orders, as long as it skips blocks."""
    def shared(setting, error):
        if len(set(setting.curves)) > 1 and setting.params.amount[1] < 1:
            error[1] = 0.2
        return error

    inner = by_rule(lambda curve, similarity, amount, head:
                    0.04 if amount >= (0.4 if curve == ("hilbert", "blocked")[head] else 0.9) else 0.3, shared=shared)
    found = LayerSearch.start(2, 2, Bounds(0.05, 0.05)).learn(inner)
    assert found.setting.dense_heads.tolist() == [False, True] and (found.error <= 0.05).all()
    again = found.learn(by_rule(lambda *_: 0.0))
    assert again.setting.dense_heads.tolist() == [False, True]  # what one call refused stays refused


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_layer_whose_errors_are_not_finite_stays_dense(value):
    inner = planted([0.4, 0.6])

    def broken(setting):
        error, kept = inner(setting)
        return Measured(error.index_fill(0, torch.tensor([1]), value), kept)

    found = LayerSearch.start(2, 2, BOUNDS).learn(broken)
    assert found.setting is None and found.error.isfinite().all()
    seen = LayerSearch.start(2, 2, BOUNDS).learn(inner).evaluate(broken)
    assert seen.setting is None and seen.sparsity.tolist() == [0, 0]
    assert seen.error.isfinite().all() and seen.unseen.isfinite().all()
    assert seen.learn(inner).setting is None  # and it stays dense


def test_evaluation_keeps_the_largest_error_of_all_its_calls():
    found = LayerSearch.start(2, 2, BOUNDS).learn(planted([0.4, 0.6]))
    for needs in ([0.4, 0.9], [0.9, 0.6], [0.4, 0.6]):
        found = found.evaluate(planted(needs))
    assert found.unseen.tolist() == pytest.approx([0.2, 0.2]) and found.unseen_calls == 3


def test_errors_are_the_largest_of_all_settings():
    found = LayerSearch.start(1, 1, Bounds(0.05, 0.05)).learn(by_rule(lambda c, s, amount, h: 0.05 - 0.01 * amount))
    before = found.error.item()
    assert found.learn(by_rule(lambda *_: 0.001)).error.item() == before > 0.01


@pytest.mark.parametrize("share, expected", ((0.39, "drop"), (0.35, "pooled")))
def test_the_pooled_tail_is_worth_it_only_where_it_saves_more_than_it_costs(share, expected):
    """One that drops keeps 0.4 of the blocks; the tail is work for 0.025 of them."""
    found = LayerSearch.start(1, 1, BOUNDS).learn(by_rule(
        lambda curve, similarity, amount, head: 0.04,
        lambda setting, amount: torch.where(amount < 1, share if setting.skipped == "pooled" else 0.4, 1.0)))
    assert found.setting.skipped == expected


def test_a_head_without_gain_in_its_groups_order_keeps_every_block():
    """Head 1 would gain along another curve, of which head 0 gains nothing."""
    needs = {("hilbert", 0): 0.3, ("blocked", 1): 0.5}
    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_rule(
        lambda curve, similarity, amount, head: 0.04 if amount >= needs.get((curve, head), 1.0) else 0.3))
    assert found.setting.curves == ("hilbert",)
    assert found.setting.dense_heads.tolist() == [False, True]
    assert found.sparsity.tolist() == pytest.approx([1 - least_amount("cdf", 0.3), 0])


def planted_anyhow(seed, heads, monotone):
    """A measure whose errors depend on everything that a head has; with `monotone`, less work never helps."""
    def noise(*key):
        return zlib.crc32(repr((seed, *key)).encode()) / 2 ** 32

    def measure(setting: Setting) -> Measured:
        pv = torch.as_tensor(setting.params.pv_threshold).expand(heads).tolist()
        errors, kept = [], []
        for h, amount in enumerate(setting.params.amount.tolist()):
            rule = (setting.params.selection, setting.skipped, setting.pv_dtype,
                    setting.curves[h // (heads // len(setting.curves))])
            judge = round(setting.params.similarity_threshold[h].item(), 3) if amount < 1 else 0
            floor = 0.06 * noise(*rule, h)
            of_amount = noise(*rule, h, judge, round(amount, 5)) if not monotone else \
                (1 - amount) * 2 * noise(*rule, h, judge)
            of_pv = 0 if amount == 1 or pv[h] == math.inf else \
                noise(*rule, h, "pv", pv[h]) if not monotone else 0.3 * noise(*rule, h, "pv") / pv[h]
            errors.append(floor + 0.2 * of_amount + of_pv)
            kept.append(amount * (0.6 + 0.4 * noise(*rule, h, judge, "kept")) if amount < 1 else 1.0)
        return Measured(torch.tensor(errors), torch.tensor(kept))

    return measure


@pytest.mark.parametrize("bounds", (Bounds(0.05, 0.05), Bounds(0.05, 0.07, 0.0)), ids=("blocks", "blocks and products"))
def test_what_is_found_holds_on_every_call_whatever_the_errors(bounds):
    """On all calls where less work never helps; on the last one where errors are arbitrary."""
    sparse = 0
    for seed in range(6):
        monotone, heads = seed % 3 > 0, 4
        found, calls = LayerSearch.start(heads, 2, bounds), []
        for call in range(3):
            calls.append(planted_anyhow((seed, call), heads, monotone))
            found = found.learn(calls[-1])
            if found.setting is None:
                continue
            sparse += 1
            for measure in calls if monotone else calls[-1:]:
                assert (measure(found.setting).error <= bounds.l2).all(), seed
                without = replace(found.setting, params=replace(found.setting.params, pv_threshold=math.inf))
                assert (measure(without).error <= bounds.l1).all(), seed
        assert (found.error <= bounds.l2).all()
    assert sparse > 4


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
    assert {rule.curve for rule in RULES} == set(CURVES)

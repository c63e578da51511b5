"""What the search chooses for a layer: it holds the bound in every head, whatever the errors, at the least work."""
import math
import zlib
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch, Measured, TunedSetting
from comfyui_spargeattn.tests.nodes.tuned.planted import BOUNDS, by_candidate, least_amount, planted


def test_an_order_holds_for_every_head_that_shares_it():
    """Head 0 gains most along the Hilbert curve, where head 1 exceeds the bound even with every block."""
    def error_of(curve, similarity, amount, head):
        if head == 1:
            return 0.2 if curve == "hilbert" else 0.04 if amount >= 0.7 else 0.3
        return 0.04 if amount >= (0.32 if curve == "hilbert" else 0.8) else 0.3

    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_candidate(error_of))
    assert found.setting.curves == ("row-major",) and (found.error <= 0.05).all()
    assert found.setting.params.amount.tolist() == pytest.approx([least_amount("cdf", x) for x in (0.8, 0.7)])


def test_a_layer_stays_dense_where_no_order_holds_for_a_whole_group():
    """Each head holds in one order alone, another one each."""
    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_candidate(
        lambda curve, similarity, amount, head: 0.04 if (curve, head) in (("hilbert", 0), ("blocked", 1)) else 0.2))
    assert found.setting is None and found.error.tolist() == [0, 0]


@pytest.mark.parametrize("exceeding", (0.2, math.nan))
def test_heads_that_exceed_the_bound_together_keep_every_block(exceeding):
    """Alone, each head holds at 0.4; head 1 does not beside heads in other orders, as long as it skips blocks."""
    def shared(setting, error):
        if len(set(setting.curves)) > 1 and setting.params.amount[1] < 1:
            error[1] = exceeding
        return error

    inner = by_candidate(lambda curve, similarity, amount, head:
                    0.04 if amount >= (0.4 if curve == ("hilbert", "blocked")[head] else 0.9) else 0.3, shared=shared)
    found = LayerSearch.start(2, 2, Bounds(0.05, 0.05)).learn(inner)
    assert found.setting.dense_heads.tolist() == [False, True] and (found.error <= 0.05).all()
    again = found.learn(by_candidate(lambda *_: 0.0))
    assert again.setting.dense_heads.tolist() == [False, True]  # what one call refused stays refused


def test_a_head_that_is_refused_keeps_every_block_in_the_order_of_its_group():
    """Head 1 holds without a judge alone, and skips blocks only beside a head without a judge."""
    def shared(setting, error):
        if len(set(setting.params.similarity_threshold.tolist())) > 1 and setting.params.amount[1] < 1:
            error[1] = 0.2
        return error

    needs = {(-1.0, 0): 1.0, (-1.0, 1): 0.5, (0.3, 0): 0.3}
    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_candidate(
        lambda curve, similarity, amount, head:
            0.04 if amount >= needs.get((round(similarity, 1), head), 2.0) else 0.3, shared=shared))
    assert found.setting.dense_heads.tolist() == [False, True]
    assert found.setting.params.similarity_threshold.tolist() == pytest.approx([0.3, -1])


def test_a_call_that_refuses_every_choice_ends():
    """A measure that holds the first time only, so that no choice is confirmed."""
    tried = []

    def measure(setting):
        key = (*setting.curves, setting.skipped, setting.pv_dtype, setting.params.selection,
               *setting.params.amount.tolist(), *setting.params.similarity_threshold.tolist())
        tried.append(key)
        return Measured(torch.full((2,), 0.01 if tried.count(key) == 1 else 1.0), setting.params.amount)

    found = LayerSearch.start(2, 2, Bounds(0.05, 0.05)).learn(measure)
    assert found.setting is None and len(tried) == len(set(tried)) + 32


def test_the_judge_that_leaves_the_least_work_is_chosen():
    needs = {0: 0.3, 1: -1.0}
    found = LayerSearch.start(2, 2, Bounds(0.05, 0.05)).learn(by_candidate(
        lambda curve, similarity, amount, head:
            0.04 if amount >= (0.4 if round(similarity, 1) == needs[head] else 0.8) else 0.3))
    assert found.setting.params.similarity_threshold.tolist() == pytest.approx([0.3, -1.0])
    assert found.setting.params.amount.tolist() == pytest.approx([least_amount("cdf", 0.4)] * 2)


def test_products_are_skipped_only_where_all_heads_hold_l2_together():
    """Alone or with equal thresholds, the heads hold from 9.5 and 4 on."""
    def shared(setting, error):
        pv = torch.as_tensor(setting.params.pv_threshold).expand(2)
        error = error + torch.where(pv >= torch.tensor([9.5, 4.0]), 0.0, 0.5)
        return error + torch.tensor([0.0, 0.5]) * (pv.isfinite().all() & (pv[0] != pv[1]))

    measure = by_candidate(lambda curve, similarity, amount, head: 0.04 if amount >= 0.4 else 0.3, shared=shared)
    found = LayerSearch.start(2, 2, BOUNDS).learn(measure)
    assert (found.error <= BOUNDS.l2).all() and (measure(found.setting).error <= BOUNDS.l2).all()


def test_products_of_a_head_that_was_dense_in_an_earlier_call_are_not_skipped():
    """Head 1 keeps too much in the first call, where it would need another P·V threshold than in the second."""
    def call(kept, pv_needs):
        def shared(setting, error):
            pv = torch.as_tensor(setting.params.pv_threshold).expand(2)
            return error + torch.where(pv >= torch.tensor([4.0, pv_needs]), 0.0, 0.5)

        return by_candidate(lambda curve, similarity, amount, head: 0.04 if amount >= (0.4, 0.95)[head] else 0.3,
                            lambda setting, amount: torch.where(amount < 1, torch.tensor([0.4, kept]), 1.0), shared)

    first, second = call(0.95, 10.0), call(0.5, 4.0)
    before = LayerSearch.start(2, 2, BOUNDS).learn(first)
    found = before.learn(second)
    assert before.setting.dense_heads.tolist() == [False, True] and not found.setting.dense_heads.any()
    assert all((measure(found.setting).error <= BOUNDS.l2).all() for measure in (first, second))
    assert found.setting.params.pv_threshold.tolist() == [4.0, math.inf]


def test_errors_are_the_largest_of_all_settings():
    found = LayerSearch.start(1, 1, Bounds(0.05, 0.05)).learn(
        by_candidate(lambda c, s, amount, h: 0.05 - 0.01 * amount))
    before = found.error.item()
    assert found.learn(by_candidate(lambda *_: 0.001)).error.item() == before > 0.01


@pytest.mark.parametrize("share, expected", ((0.39, "drop"), (0.35, "pooled")))
def test_the_pooled_tail_is_worth_it_only_where_it_saves_more_than_it_costs(share, expected):
    """One that drops keeps 0.4 of the blocks; the tail is work for 0.025 of them."""
    found = LayerSearch.start(1, 1, BOUNDS).learn(by_candidate(
        lambda curve, similarity, amount, head: 0.04,
        lambda setting, amount: torch.where(amount < 1, share if setting.skipped == "pooled" else 0.4, 1.0)))
    assert found.setting.skipped == expected


def test_a_head_without_gain_in_its_groups_order_keeps_every_block():
    """Head 1 would gain along another curve, of which head 0 gains nothing."""
    needs = {("hilbert", 0): 0.3, ("blocked", 1): 0.5}
    found = LayerSearch.start(2, 1, Bounds(0.05, 0.05)).learn(by_candidate(
        lambda curve, similarity, amount, head: 0.04 if amount >= needs.get((curve, head), 1.0) else 0.3))
    assert found.setting.curves == ("hilbert",)
    assert found.setting.dense_heads.tolist() == [False, True]
    assert found.sparsity.tolist() == pytest.approx([1 - least_amount("cdf", 0.3), 0])


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


def planted_anyhow(seed, heads, monotone):
    """A measure whose errors depend on everything that a head has; with `monotone`, less work never helps."""
    def noise(*key):
        return zlib.crc32(repr((seed, *key)).encode()) / 2 ** 32

    def measure(setting: TunedSetting) -> Measured:
        pv = torch.as_tensor(setting.params.pv_threshold).expand(heads).tolist()
        errors, kept = [], []
        for h, amount in enumerate(setting.params.amount.tolist()):
            choice = (setting.params.selection, setting.skipped, setting.pv_dtype,
                      setting.curves[h // (heads // len(setting.curves))])
            judge = round(setting.params.similarity_threshold[h].item(), 3) if amount < 1 else 0
            floor = 0.06 * noise(*choice, h)
            of_amount = noise(*choice, h, judge, round(amount, 5)) if not monotone else \
                (1 - amount) * 2 * noise(*choice, h, judge)
            of_pv = 0 if amount == 1 or pv[h] == math.inf else \
                noise(*choice, h, "pv", pv[h]) if not monotone else 0.3 * noise(*choice, h, "pv") / pv[h]
            errors.append(floor + 0.2 * of_amount + of_pv)
            kept.append(amount * (0.6 + 0.4 * noise(*choice, h, judge, "kept")) if amount < 1 else 1.0)
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

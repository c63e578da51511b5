"""Which evaluations refresh the residuals, and how often the noise level is read."""
import itertools
import math

import pytest

from comfyui_spargeattn.nodes.run.refresh_schedule import FEWEST, RefreshSchedule, leads, refresh_steps


def shifted(steps, shift=8.0):
    """A flow model's noise levels, as video models have them."""
    return [shift * u / (1 + (shift - 1) * u) for u in (1 - step / steps for step in range(steps + 1))]


def cost(noise, refreshed):
    """What a choice of refreshes costs by the definition, one step after another."""
    noise = [(1 + noise[1]) / 2 if noise[0] >= 1 else noise[0], *noise[1:]]
    snr = [math.log((1 - level) / level) for level in noise[:-1]]
    total = 0.0
    for step in range(refreshed[0], len(snr)):
        last = max(r for r in refreshed if r <= step)
        total += min(1, abs(snr[step] - snr[last]) / 4)
    return total


@pytest.mark.parametrize("first", (0, 3))
@pytest.mark.parametrize("shift", (1.0, 3.0, 8.0))
@pytest.mark.parametrize("count", (1, 2, 3, 4))
def test_no_other_choice_costs_less(count, shift, first):
    noise = shifted(12, shift)
    chosen = refresh_steps(noise, count, first)
    assert len(chosen) == count and chosen[0] == first and chosen == sorted(set(chosen))
    others = ([first, *rest] for rest in itertools.combinations(range(first + 1, 12), count - 1))
    assert cost(noise, chosen) <= min(cost(noise, other) for other in others) + 1e-12


def test_more_refreshes_than_steps():
    assert refresh_steps(shifted(5), 9) == [0, 1, 2, 3, 4]


def test_choices_that_were_good_on_a_trained_model():
    """Of 20 steps with a shift of 8: the residuals of a dense run lie as far apart as the rule takes them to."""
    assert refresh_steps(shifted(20), 6) == [0, 2, 5, 9, 13, 17]
    assert refresh_steps(shifted(20), 6, 3) == [3, 6, 9, 12, 15, 18]


def test_leads():
    """Seven tenths of the way to the mean noise of the steps served, against the way from the refresh before."""
    noise = [1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.55, 0.3, 0.1, 0.0]
    assert leads(noise, [0, 2, 5]) == pytest.approx([0.0, 0.7 * (0.8 - (0.75 + 0.7) / 2) / (1.0 - 0.8), 0.0]), \
        "the mean of 0.55, 0.3 and 0.1 is far from 0.65"
    assert leads(noise, [0, 2, 3, 5, 7]) == pytest.approx([0.0, 0.0, 0.7 * 0.05 / 0.05, 0.7 * 0.1 / 0.1, 0.0])
    assert leads(noise, [3]) == [0.0]


def test_leads_of_the_presets_schedules():
    """Those that were measured to help on clips of 20 steps; in 10 steps the last would spoil the clip."""
    assert all(lead > 0.3 for lead in leads(shifted(20), [3, 5, 8, 11, 14, 17, 19])[1:-1])
    assert leads(shifted(10), [1, 2, 4, 6, 8])[-1] == 0.0


class Followed:
    """A run of evaluations at noise levels: which refreshed, and at which the level was read."""

    def __init__(self, schedule, evaluated, count, lowest=-math.inf, highest=math.inf, largest=1.0):
        self.refresh = RefreshSchedule(count)
        self.refresh.begin(schedule, lowest, highest, largest)
        self.refreshed, self.read, self.leads = [], [], []
        for i, level in enumerate(evaluated):
            self.refresh.advance(lambda i=i, level=level: (self.read.append(i), level)[1])
            if self.refresh.due:
                self.refreshed.append(i)
                self.leads.append(self.refresh.lead)


def test_one_evaluation_a_step_is_read_four_times():
    schedule = shifted(20)
    run = Followed(schedule, [level * (1 + 1e-6) for level in schedule[:-1]], 6)
    assert run.refreshed == refresh_steps(schedule, 6) and run.read == [0, 1, 2, 3]
    assert run.refresh.levels == tuple(schedule[i] for i in run.refreshed)
    assert run.leads == leads(schedule, run.refreshed) and any(run.leads)


def test_the_last_dense_evaluation_refreshes_at_no_cost():
    schedule = shifted(20)
    run = Followed(schedule, schedule[:-1], 3, highest=schedule[4])
    assert run.refreshed == refresh_steps(schedule, 4, 3) and run.refreshed[0] == 3
    assert Followed(schedule, schedule[:-1], 3).refreshed == refresh_steps(schedule, 3)


@pytest.mark.parametrize("schedule, serves", [(shifted(20), False), (shifted(20)[:-1] + [0.1], True)])
def test_no_residuals_at_the_last_step(schedule, serves):
    """Only a second evaluation at a level above zero could use them."""
    refresh = RefreshSchedule(6)
    refresh.begin(schedule, -math.inf, schedule[4], 1.0)
    served = []
    for level in schedule[:-1]:
        refresh.advance(lambda level=level: level)
        if refresh.due:
            served.append(refresh.serves)
    assert refresh.levels[-1] == schedule[19] and served == [True] * 6 + [serves]


def test_none_after_the_end_of_the_window():
    schedule = shifted(20)
    run = Followed(schedule, schedule[:-1], 5, lowest=schedule[16])
    assert run.refreshed and max(run.refreshed) <= 16


def evaluations(schedule, kind):
    """Noise levels at which samplers evaluate the model."""
    for level, following in itertools.pairwise(schedule):
        yield level
        if kind == "heun" and following > 0:
            yield following
        if kind == "midpoint" and following > 0:
            yield math.sqrt(level * following)


@pytest.mark.parametrize("kind", ("heun", "midpoint"))
def test_samplers_that_evaluate_twice_a_step(kind):
    """Each refresh is due once, at the first evaluation that reaches its level; every level is read."""
    schedule = shifted(20)
    levels = list(evaluations(schedule, kind))
    run = Followed(schedule, levels, 6)
    expected = [next(i for i, level in enumerate(levels) if level <= due * (1 + 1e-9)) for due in run.refresh.levels]
    assert run.refreshed == expected and run.read == list(range(run.refreshed[-1] + 1))


def test_noise_levels_beyond_one():
    """A model whose noise grows to many times the picture, in its own units."""
    schedule = [14.6 * 0.75 ** step for step in range(18)] + [0.0]
    run = Followed(schedule, schedule[:-1], 3, largest=1e9)
    assert run.refreshed == refresh_steps([level / (1 + level) for level in schedule], 3)


def test_no_more_than_every_second():
    schedule = shifted(18)
    assert len(Followed(schedule, schedule[:-1], 50).refreshed) == 9


@pytest.mark.parametrize("schedule, says", [
    (shifted(FEWEST - 1), "11 steps may go sparse, and it takes 12"),
    ([], "no falling noise levels"),
    ([1.0, 0.5, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0], "no falling noise levels"),
])
def test_off_where_it_can_not_help(schedule, says):
    run = Followed(schedule, schedule[:-1], 3)
    assert says in run.refresh.problem and run.refresh.levels == () and run.refreshed == [] and run.read == []


def test_off_where_the_sampler_adds_noise():
    refresh = RefreshSchedule(3)
    refresh.steady = False
    for _ in range(2):
        refresh.begin(shifted(20), -math.inf, math.inf, 1.0)
        assert refresh.problem == "the sampler adds noise between steps" and refresh.levels == ()
        refresh.reset()
    refresh.steady = True
    refresh.begin(shifted(20), -math.inf, math.inf, 1.0)
    assert len(refresh.levels) == 3 and not refresh.problem


def test_off_by_choice():
    run = Followed(shifted(20), shifted(20)[:-1], 0)
    assert (run.refresh.problem, run.refresh.levels, run.refreshed, run.read) == ("", (), [], [])


def test_another_run():
    refresh = RefreshSchedule(3)
    for _ in range(2):
        refresh.begin(shifted(20), -math.inf, math.inf, 1.0)
        due = []
        for level in shifted(20)[:-1]:
            refresh.advance(lambda level=level: level)
            due.append(refresh.due)
        assert [i for i, x in enumerate(due) if x] == refresh_steps(shifted(20), 3)
        refresh.reset()
        assert not refresh.due and refresh.levels == ()

"""The search for a budget's plan, with every possible plan as its checker."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.candidates import (
    PlanCandidate,
    QualityCheck,
    unmeasured_step,
    with_gains,
)
from exporter.choose.budgets.refusals import refuse_nothing
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.units import Counted, Goal
from exporter.choose.selection.options import Option
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import PlanError
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.ablation.damage import Damage
from tests.exporter.made_damage import LAYERS, NAMES, MadeMeter, MadeUnit, every_walk, made_case
from tests.raising import raises

CASES = range(8)


def _held_out(meter: MadeMeter) -> MadeMeter:
    """The same model on other tokens, on which everything costs a tenth more."""
    return MadeMeter(meter.alone, meter.together, meter.shares, scale=1.1)


def _search(seed: int, floors: Floors | None = None) -> tuple[Any, ...]:
    meter, options, unit = made_case(seed)
    held_out = _held_out(meter)
    checker = QualityCheck(held_out, floors or Floors())
    settings = SearchOptions("greedy", shortlist=0)
    return Search(meter, checker, options, settings), meter, held_out, options, unit


def _gain(unit: MadeUnit, options: Any) -> float:
    return sum(unit.gain(option.names, option.replacement) for option in options)


@pytest.mark.parametrize("seed", CASES)
def test_few_plans_that_reach_the_goal_cost_less(seed: int) -> None:
    search, meter, _, options, unit = _search(seed)
    candidate = search.solve([Goal(unit, 18.0)], unit)
    assert candidate.gain(unit) >= 18.0
    best = min(
        meter.kl(PlanCandidate(tuple(item)).cut)
        for item in every_walk(options)
        if _gain(unit, item) >= 18.0
    )
    # The worst of these cases is 1.43 times as bad as the best of all choices.
    assert best * (1 - 1e-9) <= meter.kl(candidate.cut) <= 1.5 * best


@pytest.mark.parametrize("seed", CASES)
def test_floors_are_used_up_but_kept_on_other_tokens(seed: int) -> None:
    search, _, held_out, options, unit = _search(seed, Floors(perplexity_increase=0.2))
    candidate = search.solve([], unit)
    assert held_out.kl(candidate.cut) <= math.log(1.2)
    most = max(
        _gain(unit, item)
        for item in every_walk(options)
        if held_out.kl(PlanCandidate(tuple(item)).cut) <= math.log(1.2)
    )
    # A greedy way of filling a knapsack: the worst of these cases reaches 0.899 of the most.
    assert 0.85 * most <= candidate.gain(unit) <= most * (1 + 1e-9)


def _damage(rises: list[float], agreements: list[float]) -> Damage:
    """Samples of 100 tokens each, by their mean rise and agreement."""
    count = np.full(len(rises), 100.0)
    return Damage(count, 0 * count, count * agreements, count * rises, 0 * count)


@pytest.mark.parametrize(
    ("rises", "agreements", "holds", "beyond"),
    [
        ([0.03, 0.03, 0.03, 0.03], [0.95] * 4, True, False),
        ([0.00, 0.06, 0.01, 0.05], [0.95] * 4, False, False),  # 0.03 ± 0.047
        ([0.02, 0.09, 0.04, 0.06], [0.95] * 4, False, False),  # the estimate is beyond, too
        ([0.03] * 4, [1.0, 0.86, 0.97, 0.97], False, False),  # 0.95 ± 0.098
        ([0.00, 0.06, 0.01, 0.05], [1.0, 0.86, 0.97, 0.97], False, False),
        ([0.06] * 4, [0.85] * 4, False, True),
        ([0.03] * 4, [0.83, 0.84, 0.83, 0.84], False, True),
        ([0.06], [0.85], False, False),
        ([0.00, math.nan, 0.00, 0.00], [0.95] * 4, False, True),
    ],
)
def test_a_floor_is_kept_or_broken_where_all_of_the_interval_is_on_one_side(
    rises: list[float], agreements: list[float], holds: bool, beyond: bool
) -> None:
    meter, _, _ = made_case(0)
    checker = QualityCheck(meter, Floors(perplexity_increase=0.05, top1_agreement=0.9))
    damage = _damage(rises, agreements)
    rung = checker.rung_with(damage)
    assert (rung.holds, rung.is_beyond) == (holds, beyond)


def test_two_goals_hold_together() -> None:
    search, _, _, _, unit = _search(2)
    attentions = Counted(("attention",), "attention")
    candidate = search.solve([Goal(unit, 12.0), Goal(attentions, 2)], unit)
    assert candidate.gain(unit) >= 12.0
    assert candidate.gain(attentions) >= 2
    alone = search.solve([Goal(unit, 12.0)], unit)
    assert alone.gain(attentions) < 2, "the second goal asks for nothing here"


def test_nothing_idle_is_dropped() -> None:
    for seed in CASES:
        search, *_, unit = _search(seed)
        candidate = search.solve([Goal(unit, 15.0)], unit)
        assert all(candidate.without(option).gain(unit) < 15.0 for option in candidate.options)


@pytest.mark.parametrize("seed", range(16))
def test_no_sublayer_is_better_treated_in_another_way(seed: int) -> None:
    search, meter, _, options, unit = _search(seed)
    candidate = search.solve([Goal(unit, 18.0)], unit)
    own = {option.names for option in candidate.options}
    others = [
        candidate.plus([unmeasured_step(option)]) for option in options if option.names in own
    ]
    within = [meter.kl(other.cut) for other in others if other.gain(unit) >= 18.0]
    # Sums of the same damages in another order.
    assert meter.kl(candidate.cut) <= min(within) * (1 + 1e-12)


def test_no_plan_names_a_sublayer_twice_or_everything() -> None:
    search, *_, unit = _search(3, Floors(perplexity_increase="100000000%"))
    candidate = search.solve([], unit)
    names = [name for option in candidate.options for name in option.names]
    assert len(names) == len(set(names)) == len(NAMES) - 1
    for step, _ in search.path(unit, lambda _: False):
        names = [name for option in step.options for name in option.names]
        assert len(names) == len(set(names)) < len(NAMES)


def test_an_unreachable_goal_says_what_is_reachable() -> None:
    search, *_, options, unit = _search(4)
    by_name = {o.names[0]: _gain(unit, [o]) for o in options if o.replacement == "none"}
    most = sum(by_name.values()) - min(by_name.values())
    assert search.solve([Goal(unit, most - 1e-6)], unit).gain(unit) == pytest.approx(most)
    with raises(PlanError, "out-of-reach", f"{most:.1f}", 1000.0):
        search.solve([Goal(unit, 1000.0)], unit)


def test_a_goal_beyond_the_floors_says_what_is_within_them() -> None:
    search, _, held_out, _, unit = _search(5, Floors(perplexity_increase=0.1))
    most = search.solve([], unit)
    assert search.solve([Goal(unit, most.gain(unit) * 0.9)], unit).options
    with raises(
        PlanError,
        "beyond-floors",
        "10.0%",
        f"{most.gain(unit):.1f}",
        f"{held_out.kl(most.cut):.3f}",
    ):
        search.solve([Goal(unit, most.gain(unit) * 2)], unit)


@pytest.mark.parametrize(("seed", "increase"), [(6, 0.1), (12, 0.2)])
def test_a_goal_that_other_steps_reach_within_the_floors_is_reached(
    seed: int, increase: float
) -> None:
    floors = Floors(perplexity_increase=increase)
    search, _, held_out, _, unit = _search(seed, floors)
    goal = Goal(unit, 0.97 * search.within_floors(unit).gain(unit))
    blind = _search(seed)[0].solve([goal], unit)
    assert held_out.kl(blind.cut) > math.log1p(increase), "the way of least damage breaks the floor"
    candidate = search.solve([goal], unit)
    assert candidate.gain(unit) >= goal.amount
    assert held_out.kl(candidate.cut) <= math.log1p(increase)


def _level(alone: float = 0.1) -> tuple[MadeMeter, list[Option]]:
    """Sublayers that all cost the same, a map a tenth of that."""
    maps = {name: BranchReplacement() for name in NAMES}
    meter = MadeMeter(dict.fromkeys(NAMES, alone), shares=dict.fromkeys(maps.values(), 0.1))
    options = [Option((name,)) for name in NAMES]
    options += [Option((n,), replacement="linear", branch_replacements={n: maps[n]}) for n in NAMES]
    return meter, options


def test_what_a_later_goal_takes_back_is_made_up_for() -> None:
    meter, options = _level()
    maps = [option for option in options if option.replacement == "linear"]
    # A map in an attention's place saves time, one in an MLP's takes more than the MLP.
    unit = MadeUnit({(n, "linear"): 10.0 if n[1] == "attention" else -3.0 for n in NAMES})
    mlps = Counted(("mlp",), "MLP")
    search = Search(meter, QualityCheck(meter), maps, SearchOptions(shortlist=0))
    candidate = search.solve([Goal(unit, 17.0), Goal(mlps, 2)], unit)
    assert candidate.gain(unit) >= 17.0
    assert candidate.gain(mlps) == 2
    with raises(PlanError, "out-of-reach", 24.0, 26.0):
        search.solve([Goal(unit, 26.0), Goal(mlps, 2)], unit)


def test_maps_that_are_too_large_for_a_later_goal_give_way() -> None:
    meter, options = _level()
    times = MadeUnit({(o.names[0], o.replacement): 1.0 for o in options})
    sizes = MadeUnit({(n, how): 10.0 if how == "none" else 1.0 for n in NAMES
                      for how in ("none", "linear")})  # fmt: skip
    search = Search(meter, QualityCheck(meter), options, SearchOptions(shortlist=0))
    alone = search.solve([Goal(times, 5)], times)
    assert {option.replacement for option in alone.options} == {"linear"}
    candidate = search.solve([Goal(times, 5), Goal(sizes, 45.0)], times)
    assert candidate.gain(times) >= 5
    assert candidate.gain(sizes) >= 45.0


def test_nothing_that_may_go_is_said_so() -> None:
    meter, _, unit = made_case(0)
    search = Search(meter, QualityCheck(meter, Floors(perplexity_increase=0.1)), [])
    assert search.solve([], unit).options == ()
    with raises(PlanError, "nothing-to-drop"):
        refuse_nothing(search.checker, search.smallest(unit))


def test_floors_that_nothing_keeps_leave_nothing() -> None:
    search, *_, unit = _search(6, Floors(perplexity_increase=1e-6))
    assert search.solve([], unit).options == ()
    assert len(search.smallest(unit).options) == 1


@pytest.mark.parametrize("seed", CASES)
def test_the_gentlest_step_is_known_from_the_path(seed: int, monkeypatch: Any) -> None:
    search, meter, *_, options, unit = _search(seed)
    search.path(unit, lambda _: True)
    monkeypatch.setattr(meter, "measure_many", None)
    candidate, damage = search.gentlest(unit)
    monkeypatch.undo()
    alone = [PlanCandidate((option,)) for option in options if _gain(unit, [option]) > 0]
    assert damage.kl == pytest.approx(min(meter.kl(item.cut) for item in alone))
    assert damage.kl == pytest.approx(meter.kl(candidate.cut))


def test_the_path_goes_on_to_the_end_or_to_enough() -> None:
    search, meter, *_, unit = _search(7)
    whole = [candidate for candidate, _ in search.path(unit, lambda _: False)]
    assert len(whole[-1].choices) == 2 * LAYERS - 1
    costs = [meter.kl(candidate.cut) for candidate in whole]
    part = search.path(unit, lambda step: step.damage.kl > costs[1])
    assert part
    assert len(part) < len(whole)
    assert all(meter.kl(candidate.cut) <= costs[1] for candidate, _ in part)
    assert [damage.kl for _, damage in part] == pytest.approx(costs[: len(part)], rel=1e-12)


def test_an_option_that_is_beaten_in_both_is_never_tried() -> None:
    meter, options, unit = made_case(0)
    worse = {option: 0.9 if option.replacement == "bias" else 0.0 for option in options}
    level = MadeUnit(dict.fromkeys(unit.gains, 1.0))
    search = Search(meter, QualityCheck(meter), options, SearchOptions(shortlist=0), quality=worse)
    candidate = search.solve([Goal(level, 3)], level)
    assert {option.replacement for option in candidate.options} == {"bias"}
    free = Search(meter, QualityCheck(meter), options, SearchOptions(shortlist=0))
    assert {o.replacement for o in free.solve([Goal(level, 3)], level).options} != {"bias"}


def test_an_option_that_gains_much_more_is_tried_though_it_gives_back_less() -> None:
    _, options, unit = made_case(0)
    share = {"none": 0.0, "bias": 0.3, "linear": 0.9}
    quality = {option: share[option.replacement] for option in options}
    kept = {(o.names, o.replacement) for o in with_gains(options, unit, quality)}
    # A bias gains 0.98 of nothing's gain, a linear map 0.7: the map doesn't beat the bias.
    assert kept == {((name,), how) for name in NAMES for how in ("bias", "linear")}
    assert len(with_gains(options, unit)) == len(options)

"""Which cut is healed, timed or recommended for a limit or a speedup, and how none is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import DepthCell, DepthDamage, PlannedDeletion, Speedup, TriedCut
from exporter.artifacts.plan_figures import LIMITED
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.limits import (
    QualityLimits,
    Rung,
    held_figures,
    is_hopeless,
    least_share,
    rung_of,
)
from exporter.choose.budgets.options import Option, PlanCandidate
from exporter.choose.budgets.target_speedup import TOLERANCE, TimedCandidate, reach_speedup
from exporter.choose.budgets.trial_runs import TRIALS, Ladder, refuse_all
from exporter.choose.depths import recommended
from exporter.errors import PlanError, UndecidedGoalError, UnmetGoalError
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.ablation.damage import SIMILARITY, Damage
from tests.made_tables import damage
from tests.raising import raises

LIMIT, RISE = Floors(0.02), math.log(1.02)
HIGH, SAME, LOW, SIMILAR = (figure.worse_end for figure in LIMITED.values())
COSTS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def climbed(
    costs: Sequence[float], remaining: Callable[[int], float], reach: float = 0.0
) -> Ladder:
    """A ladder whose cuts keep so much of their costs after healing, each known to ``reach``."""
    ladder = Ladder(costs, 0.25)
    while (number := ladder.next) is not None:
        cost = remaining(number) * costs[number]
        ladder.tried.append(Rung(number, cost, cost + reach))
    return ladder


@pytest.mark.parametrize(
    ("share", "reach", "tried", "best"),
    [
        (0.25, 0.0, [4], 4),  # as expected: the next would cost 1.5
        (0.35, 0.0, [4, 2], 2),  # more remains: 0.35 * 2.0 holds, 0.35 * 3.0 does not
        (0.15, 0.0, [4, 5], 5),  # less remains: the next holds too, the one behind it would not
        (0.9, 0.0, [4, 1], 1),
        (1.5, 0.0, [4, 0], 0),  # the smallest is the last chance
        (3.0, 0.0, [4, 0], None),
        (0.2, 0.0, [4], 4),
        (0.2, 0.3, [4, 3], 3),  # what is not known for certain does not hold
    ],
)
def test_the_largest_cut_that_holds_is_found(
    share: float, reach: float, tried: list[int], best: int | None
) -> None:
    ladder = climbed(COSTS, lambda _: share, reach)
    assert [rung.number for rung in ladder.tried] == tried
    assert (None if ladder.best is None else ladder.best.number) == best


def test_no_more_than_a_few_are_tried_and_the_last_with_caution() -> None:
    costs = [0.1 * number for number in range(1, 100)]
    ladder = climbed(costs, lambda number: 2.0 / (1 + number) ** 0.5)
    assert [rung.holds for rung in ladder.tried] == [False] * (TRIALS - 1) + [True]


def test_a_larger_cut_is_not_taken_for_cheaper() -> None:
    assert Ladder((5.0, 1.0, 6.0), 0.25).next == 0
    assert Ladder((-0.1, -0.2, 0.0), 0.25).next == 2


def test_a_cut_holds_by_the_worse_end_of_its_interval() -> None:
    rise, floors = 0.5 * RISE, Floors(embedding_cosine=0.98)
    ends = [
        *(({"log_perplexity_increase": rise, HIGH: x * RISE}, LIMIT) for x in (0.99, 1.01)),
        *(({"cosine": 0.99, LOW: low}, floors) for low in (0.981, 0.979)),
    ]
    assert [rung_of(2, *end).holds for end in ends] == [True, False, True, False]


@pytest.mark.parametrize("trains", [True, False])
def test_a_cut_is_hopeless_by_the_better_end_of_what_healing_may_leave(trains: bool) -> None:
    share = least_share(trains)
    most, low = RISE / share, "log_perplexity_increase_low"
    rises = [{"log_perplexity_increase": 2 * most, low: part * most} for part in (1.01, 0.99)]
    assert [is_hopeless(figures, LIMIT, share) for figures in rises] == [True, False]
    assert least_share(trains=True) < least_share(trains=False)


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_a_figure_without_an_interval_decides_nothing(share: float) -> None:
    rung = rung_of(0, {"top1_agreement": share}, Floors(top1_agreement=0.95))
    assert not rung.holds
    assert not rung.is_beyond


@pytest.mark.parametrize(
    ("floors", "share"),
    [
        (LIMIT, 0.5),
        (Floors(None, 0.8), 0.25),
        (Floors(0.02, 0.9), 0.5),
        (Floors(1.0, 0.96), 1.25),
        (Floors(embedding_cosine=0.98), 0.75),
        (Floors(similarity=0.5), math.inf),  # what has no correlation keeps no limit on it
    ],
)
def test_a_cut_uses_up_a_share_of_the_limits(floors: Floors, share: float) -> None:
    figures = {"log_perplexity_increase": 0.5 * RISE, "top1_agreement": 0.95, "cosine": 0.985}
    assert floors.used_up(figures) == pytest.approx(share)
    whole = {"log_perplexity_increase": -0.01, "top1_agreement": 1.0, "cosine": 1.0, SIMILARITY: 1}
    assert floors.used_up(whole) == 0.0


def tried_cut(healed: dict[str, float], mlps: int = 1) -> TriedCut:
    """A cut of so many MLPs that doesn't hold."""
    return TriedCut(
        deletions=[PlannedDeletion(layer=layer, kind="mlp") for layer in range(mlps)],
        healed_by="fold", changed_weights=0, training_seconds=0.0, bare=healed, healed=healed,
        holds=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("healed", "floors", "told", "untold"),
    [
        ({"top1_agreement": 0.9, SAME: 0.8316}, Floors(top1_agreement=0.9),
         "--min-top1-agreement 0.831", "--at-most"),
        ({"cosine": 0.99, LOW: 0.9899, SIMILARITY: 0.95, SIMILAR: 0.9399},
         Floors(embedding_cosine=0.3, similarity=0.999), "--min-similarity 0.939",
         "--min-embedding-cosine"),
        ({"log_perplexity_increase": 0.01, HIGH: math.log1p(0.02041), "top1_agreement": 0.9},
         Floors(0.02, 0.8), "--at-most 2.1%", "--min-top1-agreement"),
        ({"log_perplexity_increase": 0.01, HIGH: math.log1p(0.01), "top1_agreement": 0.7},
         Floors(0.02, 0.8), "--min-top1-agreement 0.7", "--at-most"),
        ({"cosine": -0.5, LOW: -0.6}, Floors(embedding_cosine=0.3), "", "--min-embedding-cosine"),
    ],
)  # fmt: skip
def test_the_limits_that_would_allow_a_cut_are_named_and_would(
    healed: dict[str, float], floors: Floors, told: str, untold: str
) -> None:
    with pytest.raises(UnmetGoalError) as refused:
        refuse_all([tried_cut(healed)], QualityLimits(floors))
    hint = refused.value.hint
    assert told in hint
    assert untold not in hint


def test_what_is_not_shown_is_no_answer() -> None:
    def tried(rise: float, high: float, mlps: int = 1, low: float = 0.04) -> TriedCut:
        healed = {"log_perplexity_increase": rise, HIGH: high, "top1_agreement": 0.9}
        return tried_cut(healed | {"log_perplexity_increase_low": low}, mlps)

    limit, cuts = QualityLimits(LIMIT), [tried(0.05, 0.06), tried(0.1, 0.2, 2)]
    with raises(UnmetGoalError, "nothing-within-limits", "mlp 0"):
        refuse_all(cuts, limit)
    with raises(UnmetGoalError, "nothing-within-limits", "mlp 0", "1.020"):
        refuse_all(cuts[::-1], limit, gained=["a speedup of 1.050", "a speedup of 1.020"])
    for cuts, smaller in (
        ([tried(0.015, 0.03, low=0.0)], False),
        ([tried(0.0201, 0.03, low=0.01)], False),  # nor is that a cut that costs too much
        ([tried(0.05, 0.06), tried(0.1, 0.2, 2, low=0.01)], False),
        ([tried(0.05, 0.06)], True),
    ):
        with raises(UndecidedGoalError, "undecided-nothing-within-limits"):
            refuse_all(cuts, limit, smaller=smaller)


@pytest.mark.parametrize("rise", [math.inf, math.nan])
def test_a_loss_without_bounds_is_shown_to_break_the_limit(rise: float) -> None:
    ones, sums = np.ones(4), np.array([1.0, 2.0, rise, 1.0])
    damage = Damage(ones, 0.1 * ones, ones, nll_sums=sums, baseline_nll_sums=ones)
    assert rung_of(0, held_figures(damage), Floors(0.02)).is_beyond


BASELINE_MS = 100.0
SUBLAYERS = 40
OPTIONS = [Option(((n, "attention"),), branch_replacements={(n, "attention"): BranchReplacement()})
           for n in range(SUBLAYERS)]  # fmt: skip


class Machine:
    """Every sublayer is said to take 1 ms, and takes ``truth`` times that."""

    def __init__(self, truth: float) -> None:
        self.truth = truth
        self.measured: list[int] = []

    def solve(self, goal_ms: float) -> PlanCandidate:
        if goal_ms > SUBLAYERS:
            raise PlanError("out of reach", code="out-of-reach")
        return first(math.ceil(goal_ms))

    def measure(self, candidate: PlanCandidate) -> Speedup:
        self.measured.append(len(candidate.options))
        ratio = BASELINE_MS / (BASELINE_MS - len(candidate.options) * self.truth)
        return Speedup(ratio=ratio, ci95=(ratio * 0.99, ratio * 1.01))


def first(count: int) -> PlanCandidate:
    return PlanCandidate(tuple(OPTIONS[:count]))


def reached(target: float, solve: Any, measure: Any, **more: Any) -> TimedCandidate:
    return reach_speedup(target, BASELINE_MS * (1 - 1 / target), solve, measure, **more)


@pytest.mark.parametrize("truth", [0.6, 0.8, 1.0, 1.4, 2.0])
def test_it_comes_within_the_tolerance(truth: float) -> None:
    machine = Machine(truth)
    assert reached(1.25, machine.solve, machine.measure).miss(1.25) <= TOLERANCE
    assert len(machine.measured) == (1 if truth == 1.0 else 2)
    once = reached(1.25, machine.solve, machine.measure, rounds=1)
    assert (once.miss(1.25) > TOLERANCE) is (truth != 1.0)


@pytest.mark.parametrize(
    ("counts", "spread", "taken"),
    [
        # Who reaches the target comes before a nearer one,
        *(((30, 10), 0.01, 30), ((10, 5), 0.01, 10), ((35, 17), 0.01, 17)),
        # and whose whole interval reaches it, before all others.
        *(((20, 29), 0.02, 20), ((20, 29), 0.08, 29)),
    ],
)
def test_the_candidate_that_surely_reaches_the_target_is_taken(
    counts: tuple[int, int], spread: float, taken: int
) -> None:
    solved = itertools.chain(counts, itertools.repeat(counts[-1]))

    def measure(candidate: PlanCandidate) -> Speedup:
        ratio = BASELINE_MS / (BASELINE_MS - len(candidate.options))
        return Speedup(ratio=ratio, ci95=(ratio * (1 - spread), ratio * (1 + spread)))

    result = reached(1.2, lambda _: first(next(solved)), measure, rounds=2)
    assert len(result.candidate.options) == taken
    assert (result.speedup.ratio >= 1.2 * (1 - TOLERANCE)) is (taken != 10)


def test_a_smaller_goal_that_nothing_holds_does_not_lose_the_plan_that_reached_the_target() -> None:
    def solve(goal_ms: float) -> PlanCandidate:
        if goal_ms < 16:
            raise PlanError("the floors allow no plan between")
        return first(30)

    assert reached(1.2, solve, Machine(1.0).measure).speedup.ratio > 1.2


@pytest.mark.parametrize(("truth", "target"), [(1.0, 2.0), (0.5, 1.4)])
def test_a_target_out_of_reach_is_an_error_that_says_what_was_measured(
    truth: float, target: float
) -> None:
    machine = Machine(truth)
    with raises(PlanError, "out-of-reach", *[1.4] * len(machine.measured)):
        reached(target, machine.solve, machine.measure)


def cell(
    number: int, bare: float, healed: float | None, speedup: float | None, reach: float = 0.001
) -> DepthCell:
    """With ratios that are known to so much, where they are some of several; alone to half."""

    def within(ratio: float) -> DepthDamage:
        ends = (ratio - reach / 2, ratio + reach / 2)
        most = {"perplexity_ratio_most": ratio + reach} if reach else {}
        return damage(ratio, 0.1).model_copy(update={"perplexity_ratio_ci95": ends, **most})

    return DepthCell(
        way="attention",
        number=number,
        parameters_removed=0.01 * number,
        damage=within(bare),
        healed=None if healed is None else within(healed),
        speedup=speedup,
    )


@pytest.mark.parametrize(
    ("cells", "number"),
    [
        ([cell(2, 1.01, None, 1.05), cell(4, 1.015, None, 1.1)], 4),
        ([cell(2, 1.01, None, 1.05), cell(4, 1.03, None, 1.1)], 2),
        ([cell(2, 1.01, None, 1.05), cell(4, 1.03, 1.018, 1.1)], 4),
        ([cell(2, 1.01, None, 1.05), cell(4, 1.03, 1.0195, 1.1)], 2),  # its interval is too wide
        ([cell(2, 1.01, None, 1.05), cell(4, 1.015, None, 1.1, 0.006)], 2),
        ([cell(2, 1.01, 1.5, 1.05)], 2),  # healing did harm: the bare cut keeps it
        ([cell(2, 1.03, 1.021, 1.05)], None),
        ([cell(2, 1.0, None, 1.005)], None),  # not worth it
        ([cell(2, 1.0, None, 1.5, reach=0)], None),  # of a single sample
        ([cell(2, 1.0, None, 1.5)], 2),
        ([cell(2, 1.01, None, 1.2), cell(4, 1.005, None, 1.2)], 4),
        ([cell(2, 1.01, None, None), cell(4, 1.01, None, None)], 4),  # no speed: the smaller model
        ([DepthCell(way="block", number=2, refused="The plan drops everything.")], None),
        ([], None),
    ],
)
def test_the_fastest_cut_within_the_limit_is_recommended(
    cells: list[DepthCell], number: int | None
) -> None:
    best = recommended(cells, 0.02)
    assert (best and best.number) == number

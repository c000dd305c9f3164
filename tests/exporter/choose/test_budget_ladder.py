"""Which of ever larger cuts is healed next, until the largest that holds a limit is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.limits import (
    HIGH,
    LEAST_SHARE,
    LOW,
    Rung,
    is_hopeless,
    rung_of,
)
from exporter.choose.budgets.trial_runs import TRIALS, Ladder

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
    ("share", "tried", "best"),
    [
        (0.25, [4], 4),  # as expected: the next would cost 1.5
        (0.35, [4, 2], 2),  # more remains: 0.35 * 2.0 holds, 0.35 * 3.0 does not
        (0.15, [4, 5], 5),  # less remains: the next holds too, the one behind it would not
        (0.9, [4, 1], 1),
        (1.5, [4, 0], 0),  # the smallest is the last chance
        (3.0, [4, 0], None),
    ],
)
def test_the_largest_cut_that_holds_is_found(
    share: float, tried: list[int], best: int | None
) -> None:
    ladder = climbed(COSTS, lambda _: share)
    assert [rung.number for rung in ladder.tried] == tried
    assert (None if ladder.best is None else ladder.best.number) == best


def test_what_is_not_known_for_certain_does_not_hold() -> None:
    sure, unsure = (climbed(COSTS, lambda _: 0.2, reach) for reach in (0.0, 0.3))
    assert [item.best and item.best.number for item in (sure, unsure)] == [4, 3]


def test_no_more_than_a_few_are_tried_and_the_last_with_caution() -> None:
    costs = [0.1 * number for number in range(1, 100)]
    ladder = climbed(costs, lambda number: 2.0 / (1 + number) ** 0.5)
    assert [rung.holds for rung in ladder.tried] == [False] * (TRIALS - 1) + [True]


def test_a_larger_cut_is_not_taken_for_cheaper() -> None:
    assert Ladder((5.0, 1.0, 6.0), 0.25).next == 0
    assert Ladder((-0.1, -0.2, 0.0), 0.25).next == 2


def test_a_bare_cut_is_hopeless_where_no_healing_leaves_so_little() -> None:
    limit = Floors(0.02)
    most = limit.log_perplexity_increase / LEAST_SHARE
    assert is_hopeless({"log_perplexity_increase": 1.01 * most}, limit)
    assert not is_hopeless({"log_perplexity_increase": 0.99 * most}, limit)


def test_a_cut_holds_by_the_worse_end_of_its_interval() -> None:
    limit, rise = Floors(0.02), math.log(1.02)
    held = {"log_perplexity_increase": 0.5 * rise, HIGH: 0.99 * rise}
    assert rung_of(2, held, limit).holds
    assert not rung_of(2, held | {HIGH: 1.01 * rise}, limit).holds
    assert rung_of(2, {"cosine": 0.99, LOW: 0.981}, Floors(embedding_cosine=0.98)).holds
    assert not rung_of(2, {"cosine": 0.99, LOW: 0.979}, Floors(embedding_cosine=0.98)).holds


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_a_figure_without_an_interval_decides_nothing(share: float) -> None:
    rung = rung_of(0, {"top1_agreement": share}, Floors(top1_agreement=0.95))
    assert not rung.holds
    assert not rung.is_beyond


@pytest.mark.parametrize(
    ("floors", "share"),
    [
        (Floors(0.02), 0.5),
        (Floors(None, 0.8), 0.25),
        (Floors(0.02, 0.9), 0.5),
        (Floors(1.0, 0.96), 1.25),
        (Floors(embedding_cosine=0.98), 0.75),
    ],
)
def test_a_cut_uses_up_a_share_of_the_limits(floors: Floors, share: float) -> None:
    rise = 0.5 * Floors(0.02).log_perplexity_increase
    figures = {"log_perplexity_increase": rise, "top1_agreement": 0.95, "cosine": 0.985}
    assert floors.used_up(figures) == pytest.approx(share)
    whole = {"log_perplexity_increase": -0.01, "top1_agreement": 1.0, "cosine": 1.0}
    assert floors.used_up(whole) == 0.0

"""A plan's measured speedup is brought to the target, though the costs are wrong."""

from __future__ import annotations

import pytest

from exporter.artifacts import Speedup
from exporter.choose.budgets.candidates import PlanCandidate
from exporter.choose.budgets.target_speedup import TOLERANCE, TimedCandidate, reach_speedup
from exporter.choose.selection.options import Option
from exporter.errors import PlanError
from exporter.models.ablation.branch_replacements import BranchReplacement
from tests.raising import raises

BASELINE_MS = 100.0
EACH_MS = 1.0
SUBLAYERS = 40
OPTIONS = [Option(((n, "attention"),), branch_replacements={(n, "attention"): BranchReplacement()})
           for n in range(SUBLAYERS)]  # fmt: skip


class Machine:
    """Every sublayer is said to take 1 ms, and takes ``truth`` times that."""

    def __init__(self, truth: float) -> None:
        self.truth = truth
        self.measured: list[int] = []

    def solve(self, goal_ms: float) -> PlanCandidate:
        needed = next((n for n in range(SUBLAYERS + 1) if n * EACH_MS >= goal_ms), None)
        if needed is None:
            raise PlanError("out of reach", code="out-of-reach")
        return PlanCandidate(tuple(OPTIONS[:needed]))

    def measure(self, candidate: PlanCandidate) -> Speedup:
        self.measured.append(len(candidate.options))
        ratio = BASELINE_MS / (BASELINE_MS - len(candidate.options) * EACH_MS * self.truth)
        return Speedup(ratio=ratio, ci95=(ratio * 0.99, ratio * 1.01))


def _goal_ms(target: float) -> float:
    return BASELINE_MS * (1 - 1 / target)


@pytest.mark.parametrize("truth", [0.6, 0.8, 1.0, 1.4, 2.0])
def test_it_comes_within_the_tolerance(truth: float) -> None:
    machine = Machine(truth)
    candidate = reach_speedup(1.25, _goal_ms(1.25), machine.solve, machine.measure)
    assert candidate.miss(1.25) <= TOLERANCE
    assert len(machine.measured) == (1 if truth == 1.0 else 2)


def test_costs_that_are_right_need_one_candidate_and_wrong_ones_are_off_by_more() -> None:
    right, wrong = Machine(1.0), Machine(2.0)
    assert reach_speedup(1.25, _goal_ms(1.25), right.solve, right.measure).miss(1.25) <= TOLERANCE
    once = reach_speedup(1.25, _goal_ms(1.25), wrong.solve, wrong.measure, rounds=1)
    assert once.miss(1.25) > TOLERANCE


@pytest.mark.parametrize(("steps", "taken"), [((10, 30), 30), ((5, 10), 10), ((17, 35), 17)])
def test_a_candidate_that_reaches_the_target_is_taken_before_a_nearer_one(
    steps: tuple[int, int], taken: int
) -> None:
    machine, (few, many) = Machine(1.0), steps

    def coarse(goal_ms: float) -> PlanCandidate:
        return PlanCandidate(tuple(OPTIONS[: few if goal_ms <= 12 else many]))

    candidate = reach_speedup(1.2, _goal_ms(1.2), coarse, machine.measure)
    assert len(candidate.candidate.options) == taken
    assert candidate.reaches(1.2) is (taken != 10)


@pytest.mark.parametrize(("spread", "taken"), [(0.02, 17), (0.08, 35)])
def test_a_candidate_whose_whole_interval_reaches_the_target_is_taken_first(
    spread: float, taken: int
) -> None:
    """As ``--require-speedup`` asks, though the ratio alone reaches it in a slower candidate."""
    counts = iter((17, 35))

    def measure(candidate: PlanCandidate) -> Speedup:
        ratio = 1.25 if len(candidate.options) == 17 else 1.4
        return Speedup(ratio=ratio, ci95=(ratio * (1 - spread), ratio * (1 + spread)))

    result = reach_speedup(
        1.2,
        _goal_ms(1.2),
        lambda _: PlanCandidate(tuple(OPTIONS[: next(counts)])),
        measure,
        rounds=2,
    )
    assert len(result.candidate.options) == taken


def test_a_smaller_goal_that_nothing_holds_does_not_lose_the_plan_that_reached_the_target() -> None:
    machine = Machine(1.0)

    def solve(goal_ms: float) -> PlanCandidate:
        if goal_ms < 16:
            raise PlanError("the floors allow no plan between")
        return PlanCandidate(tuple(OPTIONS[:30]))

    assert reach_speedup(1.2, _goal_ms(1.2), solve, machine.measure).speedup.ratio > 1.2


def test_the_first_goal_out_of_reach_is_an_error() -> None:
    machine = Machine(1.0)
    with raises(PlanError, "out-of-reach"):
        reach_speedup(2.0, _goal_ms(2.0), machine.solve, machine.measure)


def test_a_target_that_the_measurement_moves_out_of_reach_says_what_was_measured() -> None:
    machine = Machine(0.5)
    with raises(PlanError, "out-of-reach", 1.4):
        reach_speedup(1.4, _goal_ms(1.4), machine.solve, machine.measure)


def test_a_disturbed_measurement_moves_the_goal_no_further_than_twice() -> None:
    goals: list[float] = []
    machine = Machine(0.01)

    def solve(goal_ms: float) -> PlanCandidate:
        goals.append(goal_ms)
        return machine.solve(min(goal_ms, 30.0) + 0.1 * len(goals))

    reach_speedup(1.1, _goal_ms(1.1), solve, machine.measure, rounds=2)
    assert goals[1] == pytest.approx(2 * goals[0])


@pytest.mark.parametrize(
    ("ci95", "shown"), [((1.24, 1.27), True), ((1.20, 1.26), False), ((1.0, 1.6), False)]
)
def test_a_middle_near_the_target_is_not_enough(ci95: tuple[float, float], shown: bool) -> None:
    candidate = TimedCandidate(PlanCandidate(), Speedup(ratio=1.25, ci95=ci95))
    assert candidate.miss(1.25) == 0
    assert candidate.is_shown(1.25) is shown

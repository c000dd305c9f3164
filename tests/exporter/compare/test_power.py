"""Power that is asked for: how long it takes, when it ends, and where another run goes on."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import LatencyRow
from exporter.artifacts.store import Store
from exporter.compare.kept import forget
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.row import Chunk, MeasuredRow
from exporter.compare.timing.statistics import PowerGoal, SpeedupEstimate
from exporter.errors import UsageError
from tests.made_reports import gate_report
from tests.raising import raises
from tests.virtual_time import (
    HELD_OUT,
    RECORDED,
    BusyMachine,
    Noise,
    Replayed,
    VirtualCell,
    virtual_pair,
)

GOAL = PowerGoal(power=0.95, smallest=0.03, threshold=0.01)


def measured(seconds: float, store: Store | None = None, **changes: Any) -> LatencyRow:
    noise = BusyMachine(1, **changes)
    clock, arms = virtual_pair(noise, slowdown=1.03, call_ms=29.0, seed=1)
    budget = TimingBudget(seconds=seconds, power=GOAL)
    (row,) = measure_rows(arms, [VirtualCell()], budget, clocks=clock.clocks, store=store)
    return row


def test_the_wanted_error_has_just_the_power() -> None:
    for degrees in (5.0, 30.0, 500.0):
        wanted = GOAL.wanted_error(degrees)
        assert GOAL.chance(wanted, degrees) == pytest.approx(0.95, abs=1e-6)
        assert GOAL.chance(wanted * 1.2, degrees) < 0.95 < GOAL.chance(wanted / 1.2, degrees)


def test_a_known_error_is_worked_out_by_hand() -> None:
    """Log 1.03 less log 1.01 is 0.01961; 1.645 errors for the interval, 1.645 for the power."""
    assert GOAL.wanted_error(1e6) == pytest.approx(0.01961 / 3.29, rel=1e-3)


def test_twice_the_error_takes_four_times_as_long() -> None:
    wanted = GOAL.wanted_error(1e6)
    result = GOAL.outlook(SpeedupEstimate(0.0, 2 * wanted, 1e6), chunks=20, seconds=10.0)
    assert result.needed_s == pytest.approx(40.0, rel=1e-3)
    assert not result.is_reached
    assert GOAL.outlook(SpeedupEstimate(0.0, wanted / 2, 1e6), 20, 10.0).is_reached


def test_times_without_noise_need_no_more() -> None:
    result = GOAL.outlook(SpeedupEstimate(0.01, 0.0, 5.0), chunks=6, seconds=9.0)
    assert result.is_reached
    assert math.isfinite(result.needed_s)


def test_a_row_ends_once_it_has_the_power_and_says_so() -> None:
    row = measured(600.0)
    assert row.stopped == "power"
    assert row.power is not None
    assert row.power.is_reached
    assert row.seconds is not None
    assert row.seconds < 600
    assert row.verdict == "slower"


def row_of_chunks(shift: float, scatter: float) -> MeasuredRow:
    """Six chunks, of which every second is slower by a share; their rounds scatter."""
    row = MeasuredRow(
        VirtualCell(), ["baseline", "candidate"], builds=1, reloaded=True, threshold=0.01,
        chunks=160, seconds=600.0, goal=GOAL,
    )  # fmt: skip
    for chunk in range(6):
        times = np.full((12, 2, 2, 1), 29.0)
        times[::2, 1] *= 1 + scatter
        times[1::2, 1] /= 1 + scatter
        times[:, 1] *= 1 + shift * (chunk // 2 % 2)
        row.add(Chunk(times, 3.0, True, "host", planned=160, reloaded=True))
    return row


def test_chunks_that_agree_by_chance_are_not_believed() -> None:
    lucky = row_of_chunks(shift=0.0, scatter=0.1)
    assert GOAL.outlook(lucky.estimate(), 6, 18.0).is_reached
    result = lucky.outlook()
    assert result is not None
    assert not result.is_reached
    assert lucky.stopped is None
    assert row_of_chunks(shift=0.0, scatter=0.001).stopped == "power"


def test_chunks_that_differ_count_as_before() -> None:
    row = row_of_chunks(shift=0.05, scatter=0.001)
    assert row.outlook() == GOAL.outlook(row.estimate(), 6, 18.0)
    assert row.stopped is None


def test_a_limit_ends_it_before_and_tells_how_far_it_got() -> None:
    row = measured(30.0, contention=6.0, scatter=0.6)
    assert row.stopped in ("budget", "narrow")
    assert row.power is not None
    assert row.power.reached < 0.95
    assert row.power.needed_s > (row.seconds or 0)


def test_another_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    first = measured(30.0, Store(tmp_path / "kept.jsonl", {"a": 1}), scatter=0.4)
    again = measured(600.0, Store(tmp_path / "kept.jsonl", {"a": 1}), scatter=0.4)
    taken = first.baseline.samples_ms
    assert again.baseline.samples_ms[: len(taken)] == taken
    assert again.rounds > first.rounds


def test_what_lacks_its_power_is_kept_for_another_run(tmp_path: Path) -> None:
    store = Store(tmp_path / ".depthcut" / "comparison.jsonl", {})
    row = measured(30.0, store, contention=6.0, scatter=0.6)
    file = tmp_path / ".depthcut" / "comparison.jsonl"
    forget(tmp_path, gate_report([row]))
    assert file.exists()
    assert row.power is not None
    reached = row.power.model_copy(update={"reached": 0.96})
    forget(tmp_path, gate_report([row.model_copy(update={"power": reached})]))
    assert not file.exists()


def test_more_power_or_time_goes_on_with_what_was_kept_and_other_options_do_not() -> None:
    own = TimingOptions(power=0.8)
    assert own.kept == TimingOptions(power=0.95, smallest=0.05, time_budget_s=300.0).kept
    assert own.kept != TimingOptions(power=0.8, reload=False).kept
    assert own.kept != TimingOptions().kept


@pytest.mark.parametrize("power", [0.01, 0.49, 1.0])
def test_a_power_is_at_least_half(power: float) -> None:
    with pytest.raises(UsageError):
        TimingOptions(power=power)
    assert TimingOptions(power=0.5).goal is not None


@pytest.mark.parametrize(
    ("changes", "timing", "names"),
    [
        ({"rounds": 48}, {"power": 0.95}, ("--power", "--rounds")),
        ({}, {"power": 0.95, "smallest": 0.01}, ("--smallest", "--threshold")),
    ],
)
def test_demands_that_contradict_each_other_are_refused(
    changes: dict[str, Any], timing: dict[str, float], names: tuple[str, ...]
) -> None:
    with raises(UsageError, "", *names):
        CompareOptions(**changes, timing=TimingOptions(**timing))
    CompareOptions(**changes)
    CompareOptions(timing=TimingOptions(power=0.95))


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Each trial collects garbage; conftest.py puts aside what was imported before."""
    importlib.import_module("scipy.stats")


def recorded(seed: int) -> Noise:
    with np.load(RECORDED, allow_pickle=False) as file:
        return Replayed(file["2_threads"].astype(np.float64), seed)


def generated(seed: int) -> Noise:
    return BusyMachine(seed)


def verdicts(make: Callable[[int], Noise], slowdown: float, trials: int) -> Counter[str]:
    counter: Counter[str] = Counter()
    for seed in range(trials):
        time, arms = virtual_pair(make(seed), slowdown=slowdown, seed=seed, lottery=0.002)
        (row,) = measure_rows(arms, [VirtualCell()], TimingBudget(seconds=60), clocks=time.clocks)
        assert row.seconds is not None
        assert row.seconds < 64
        counter[row.verdict] += 1
    return counter


@pytest.mark.parametrize("make", [recorded, generated])
def test_equal_arms_are_hardly_ever_told_apart(make: Callable[[int], Noise]) -> None:
    result = verdicts(make, 1.0, 24)
    assert result["faster"] + result["slower"] <= 2, result


@pytest.mark.parametrize("make", [recorded, generated])
def test_a_slowdown_of_three_percent_is_found(make: Callable[[int], Noise]) -> None:
    result = verdicts(make, 1.03, 16)
    assert result["slower"] >= 13, result
    assert result["faster"] + result["same"] == 0, result


def test_six_recordings_of_five_minutes_are_held_out() -> None:
    with np.load(HELD_OUT, allow_pickle=False) as file:
        seconds = [file[name].astype(np.float64).sum() / 1000 for name in file.files]
    assert len(seconds) >= 6
    assert min(seconds) > 295

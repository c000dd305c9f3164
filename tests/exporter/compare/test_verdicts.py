"""Verdicts in virtual time: hardly any false one, and a slowdown of 3 % is found."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from virtual_time import (
    HELD_OUT,
    RECORDED,
    BusyMachine,
    Noise,
    Replayed,
    VirtualCell,
    virtual_pair,
)

from exporter.compare.timing.measuring import TimingBudget, measure_rows


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
    found: Counter[str] = Counter()
    for seed in range(trials):
        time, arms = virtual_pair(make(seed), slowdown=slowdown, seed=seed, lottery=0.002)
        (row,) = measure_rows(arms, [VirtualCell()], TimingBudget(seconds=60), clocks=time.clocks)
        assert row.seconds is not None
        assert row.seconds < 64
        found[row.verdict] += 1
    return found


@pytest.mark.parametrize("make", [recorded, generated])
def test_equal_arms_are_hardly_ever_told_apart(make: Callable[[int], Noise]) -> None:
    found = verdicts(make, 1.0, 24)
    assert found["faster"] + found["slower"] <= 2, found


@pytest.mark.parametrize("make", [recorded, generated])
def test_a_slowdown_of_three_percent_is_found(make: Callable[[int], Noise]) -> None:
    found = verdicts(make, 1.03, 16)
    assert found["slower"] >= 13, found
    assert found["faster"] + found["same"] == 0, found


def test_the_recorded_machine_was_busy() -> None:
    with np.load(RECORDED, allow_pickle=False) as file:
        steps = file["2_threads"]
    assert 1.5 < np.median(steps) / steps.min() < 4


def test_six_recordings_of_five_minutes_are_held_out() -> None:
    with np.load(HELD_OUT, allow_pickle=False) as file:
        seconds = [file[name].astype(np.float64).sum() / 1000 for name in file.files]
    assert len(seconds) >= 6
    assert min(seconds) > 295

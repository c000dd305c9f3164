"""A process that is kept on CPUs of its own while it is measured."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from exporter.compare.options import TimingOptions
from exporter.compare.pinning import pinning
from exporter.engines import pinning as module
from exporter.engines.pinning import pinned
from tests.heard import Heard


def place() -> tuple[set[int], int]:
    return os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four CPUs of two cores: 0 and 2, 1 and 3."""
    monkeypatch.setattr(module, "_CPUS", tmp_path)
    for cpu in range(4):
        file = tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{cpu % 2},{cpu % 2 + 2}\n")


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize(
    ("threads", "allowed", "chosen"),
    [
        (1, {0, 1, 2, 3}, {3}),
        (2, {0, 1, 2, 3}, {3, 2}),
        (3, {0, 1, 2, 3}, {3, 2, 1}),
        (2, {0, 1, 3}, {3, 0}),  # 1 and 3 are one core
        (4, {0, 1}, {0, 1}),
        (0, {0, 1}, {1}),
    ],
)
def test_threads_get_a_core_each_as_long_as_there_are_some(
    threads: int, allowed: set[int], chosen: set[int]
) -> None:
    assert module._choice(allowed, threads) == chosen


def tell(place: Path, name: str, values: list[int]) -> None:
    for cpu, value in enumerate(values):
        file = place / f"cpu{cpu}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")


CAPACITY, MOST_KHZ = "cpu_capacity", "cpufreq/cpuinfo_max_freq"


@pytest.mark.parametrize(
    ("name", "values", "threads", "chosen"),
    [
        (MOST_KHZ, [5_400_000, 5_400_000, 3_900_000, 3_900_000], 1, {1}),
        (MOST_KHZ, [5_400_000, 5_400_000, 3_900_000, 3_900_000], 3, {0, 1, 3}),
        (MOST_KHZ, [5_700_000, 5_500_000, 5_500_000, 5_600_000], 2, {3, 2}),  # all of a kind
        (CAPACITY, [1024, 760, 250, 250], 2, {0, 1}),
        (CAPACITY, [1024, 760, 250], 1, {3}),  # the kernel doesn't say it of all
    ],
)
def test_fast_cores_come_before_slow_ones(
    name: str, values: list[int], threads: int, chosen: set[int],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_CPUS", tmp_path)
    tell(tmp_path, name, values)
    assert module._choice({0, 1, 2, 3}, threads) == chosen


@pytest.mark.usefixtures("cores")
def test_a_slow_core_of_its_own_comes_before_half_a_fast_one(tmp_path: Path) -> None:
    tell(tmp_path, MOST_KHZ, [5_000_000, 3_500_000, 5_000_000, 3_500_000])
    assert module._choice({0, 1, 2, 3}, 1) == {2}
    assert module._choice({0, 1, 2, 3}, 2) == {2, 3}


def test_without_the_kernel_s_word_each_cpu_is_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPUS", tmp_path)
    assert module._choice({0, 1, 2}, 2) == {1, 2}


def test_all_threads_are_pinned_and_let_go_again() -> None:
    before, told, ending = place(), [], threading.Event()

    def other() -> None:
        ending.wait(10)
        told.append(place())

    running = threading.Thread(target=other)
    running.start()
    try:
        with pinned(1) as found:
            assert os.sched_getaffinity(0) == set(found.cpus)
            assert len(found.cpus) == 1
            assert os.getpriority(os.PRIO_PROCESS, 0) == found.nice
            assert os.sched_getaffinity(running.native_id or 0) == set(found.cpus)
            inherits = threading.Thread(target=lambda: told.append(place()))
            inherits.start()
            inherits.join()
            assert told.pop()[0] == set(found.cpus)
    finally:
        ending.set()
        running.join()
    assert place() == before
    assert told == [before]


def test_what_is_not_allowed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    before, heard = place(), Heard()
    monkeypatch.setattr(module.os, "sched_setaffinity", refuse)
    monkeypatch.setattr(module.os, "setpriority", refuse)
    with pinning(1, TimingOptions(pin=True), heard) as found:
        assert found is not None
        assert len(found.refused) == 2
        assert (set(found.cpus), found.nice) == before
    assert len(heard.lines) == 1 + 2


def test_more_threads_than_cpus_are_told() -> None:
    with pinned(len(os.sched_getaffinity(0)) + 1) as found:
        assert any("threads" in each for each in found.refused)


def test_unasked_nothing_is_pinned() -> None:
    before, heard = place(), Heard()
    with pinning(1, TimingOptions(), heard) as found:
        assert found is None
        assert place() == before
    assert heard.lines == []

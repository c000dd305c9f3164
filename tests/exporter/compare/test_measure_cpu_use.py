"""The share of the machine that other processes take, on counters written by hand and real ones."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.engines import environment
from exporter.engines.environment import CpuTimes, cpu_times, other_cpu_share


def test_own_time_is_taken_off_and_idle_time_is_none() -> None:
    before = CpuTimes(total=100.0, busy=50.0, own=10.0)
    assert other_cpu_share(before, CpuTimes(total=120.0, busy=65.0, own=20.0)) == 0.25
    assert other_cpu_share(before, CpuTimes(total=120.0, busy=60.0, own=20.0)) == 0.0


def test_counters_of_unlike_clocks_give_no_share_beyond_all_or_nothing() -> None:
    before = CpuTimes(total=100.0, busy=50.0, own=10.0)
    assert other_cpu_share(before, CpuTimes(total=101.0, busy=51.0, own=11.2)) == 0.0
    assert other_cpu_share(before, CpuTimes(total=101.0, busy=51.2, own=10.0)) == 1.0


def test_without_counters_the_share_is_not_known() -> None:
    now = CpuTimes(total=1.0, busy=1.0, own=1.0)
    for pair in ((None, now), (now, None), (now, now)):
        assert other_cpu_share(*pair) is None


@pytest.mark.parametrize("text", ["", "intr 5", "cpu a b c d e", "cpu 1 2 3"])
def test_a_kernel_that_doesn_t_tell_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(environment, "_KERNEL_COUNTERS", tmp_path / "stat")
    assert cpu_times() is None
    (tmp_path / "stat").write_text(text)
    assert cpu_times() is None


def test_the_kernel_s_line_is_read_by_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text("cpu  10 20 30 400 50 1 2 7 9 9\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(environment, "_KERNEL_COUNTERS", tmp_path / "stat")
    monkeypatch.setattr(environment.os, "sysconf", lambda _: 10)
    found = cpu_times()
    assert found is not None
    assert (found.total, found.busy) == (52.0, 7.0)


def test_a_busy_neighbour_is_seen() -> None:
    before = cpu_times()
    if before is None:
        pytest.skip("the kernel tells no CPU times")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        time.sleep(0.5)
        after = cpu_times()
        neighbour.kill()
    share = other_cpu_share(before, after)
    assert share is not None
    assert share > 0.05 / (environment.os.cpu_count() or 1)

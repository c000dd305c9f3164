"""What a machine takes from a measurement, as the kernel's files tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import MachineState
from exporter.engines import machine_watch as module
from exporter.engines.machine_watch import MachineWatch, doubt, quota
from exporter.report.sections.machine import machine_remarks


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel, whose files a test writes."""
    for name, place in (
        ("_CGROUP", "cgroup"),
        ("_OWN_CGROUP", "own"),
        ("_KERNEL_COUNTERS", "stat"),
    ):
        monkeypatch.setattr(module, name, tmp_path / place)
    return tmp_path


def tell(kernel: Path, **files: str) -> None:
    for name, text in files.items():
        path = kernel / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cgroup__cpu_DOT_max": "max 100000"}, None),
        ({"cgroup__cpu_DOT_max": "150000 100000"}, 1.5),
        ({"cgroup__cpu_DOT_max": "nonsense"}, None),
        ({"cgroup__cpu__cpu_DOT_cfs_quota_us": "-1", "cgroup__cpu__cpu_DOT_cfs_period_us": "1000"},
         None),
        ({"cgroup__cpu__cpu_DOT_cfs_quota_us": "500", "cgroup__cpu__cpu_DOT_cfs_period_us": "1000"},
         0.5),
        ({"own": "0::/a/b", "cgroup__a__cpu_DOT_max": "200000 100000",
          "cgroup__a__b__cpu_DOT_max": "max 100000"}, 2.0),
        ({"own": "4:cpu,cpuacct:/job\n0::/", "cgroup__cpu,cpuacct__job__cpu_DOT_cfs_quota_us":
          "3000", "cgroup__cpu,cpuacct__job__cpu_DOT_cfs_period_us": "1000"}, 3.0),
    ],
)  # fmt: skip
def test_a_quota_is_that_of_the_strictest_group(
    kernel: Path, files: dict[str, str], cpus: float | None
) -> None:
    tell(kernel, **files)
    assert quota().cpus == cpus


@pytest.mark.parametrize(("threads", "cpus"), [(2, 64), (64, 2)])
def test_a_look_tells_what_was_taken_since_the_last(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, threads: int, cpus: int
) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: cpus)
    clock = iter([0.0, 10.0, 20.0])
    tell(kernel, cgroup__cpu_DOT_max="100000 100000", stat="cpu 10 0 0 90 0 0 0 0 0 0",
         cgroup__cpu_DOT_stat="throttled_usec 1000000")  # fmt: skip
    watch = MachineWatch(threads, lambda: next(clock))
    tell(kernel, cgroup__cpu_DOT_max="50000 100000", stat="cpu 60 0 0 110 0 0 0 30 0 0",
         cgroup__cpu_DOT_stat="throttled_usec 5000000")  # fmt: skip
    first, second = watch.look(), watch.look()
    assert first["quota_cpus"] == 0.5
    assert first["quota_waiting_share"] == pytest.approx(0.2)
    assert first["steal_share"] == pytest.approx(0.3)
    assert second["quota_waiting_share"] == 0
    assert second["steal_share"] is None  # no tick has passed


@pytest.mark.parametrize(
    "later",
    [
        {"cgroup__cpu_DOT_stat": "throttled_usec 10"},  # the group was made anew
        {"own": "0::/a", "cgroup__a__cpu_DOT_max": "50000 100000",
         "cgroup__a__cpu_DOT_stat": "throttled_usec 9000000"},  # a stricter group counts for itself
    ],
)  # fmt: skip
def test_counts_that_have_no_beginning_are_not_told(kernel: Path, later: dict[str, str]) -> None:
    tell(kernel, cgroup__cpu_DOT_max="100000 100000", cgroup__cpu_DOT_stat="throttled_usec 100")
    watch = MachineWatch(2)
    tell(kernel, **later)
    assert watch.look()["quota_waiting_share"] is None


def test_a_kernel_that_tells_nothing_is_no_reason_to_doubt(kernel: Path) -> None:
    looks = [MachineState(seconds=n).model_copy(update=MachineWatch(2).look()) for n in range(5)]
    assert doubt(looks) == ""
    assert machine_remarks(looks, 2) == []


def states(count: int, **fields: float | bool | None) -> list[MachineState]:
    return [MachineState(seconds=n).model_copy(update=fields) for n in range(count)]


@pytest.mark.parametrize(
    ("seen", "doubtful"),
    [
        (states(9, steal_share=0.3), True),
        (states(9, quota_waiting_share=0.2), True),
        (states(2, steal_share=0.3), False),
        (states(9, steal_share=0.1, quota_waiting_share=0.05), False),
        ([*states(8, steal_share=0.3), *states(1, steal_share=0.0)], False),
    ],
)
def test_looks_in_a_row_are_doubted_and_single_ones_are_not(
    seen: list[MachineState], doubtful: bool
) -> None:
    assert bool(doubt(seen)) == doubtful


@pytest.mark.parametrize(
    ("seen", "count"),
    [
        (states(3), 0),
        (states(3, quota_cpus=2.0, steal_share=0.01), 0),
        ([*states(3, quota_cpus=2.0), *states(1, quota_cpus=4.0)], 1),
        ([*states(3), *states(1, quota_cpus=1.0)], 2),  # it changed, and is less than the threads
        (states(3, steal_share=0.1), 1),
        (states(3, quota_waiting_share=0.1), 1),
    ],
)
def test_the_reader_is_told_what_matters(seen: list[MachineState], count: int) -> None:
    assert len(machine_remarks(seen, 2)) == count

"""The machine: its record, what takes of a measurement, threads by default, and huge pages."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter.artifacts import MachineState
from exporter.engines import environment
from exporter.engines.environment import (
    GpuWatch,
    MachineWatch,
    default_threads,
    doubt,
    gpu_name,
    processor_name,
    quota,
    throttled_in,
)
from exporter.engines.runners import base
from exporter.engines.runners.base import HUGE_PAGE_BYTES, move_to_huge_pages, private_regions
from exporter.report.sections.arms import machine_remarks
from tests.stand_in.installed import stand_in

Tell = Callable[[dict[str, str]], None]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Writes files of a kernel, which has no others."""
    for name, place in (("_CGROUP", "group"), ("_OWN_CGROUP", "own"), ("_KERNEL_COUNTERS", "stat")):
        monkeypatch.setattr(environment, name, tmp_path / place)
    monkeypatch.setattr(environment, "_CPU_INFO", tmp_path / "cpuinfo")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"group/cpu.max": "max 100000"}, None),
        ({"group/cpu.max": "150000 100000"}, 1.5),
        ({"group/cpu.max": "nonsense"}, None),
        ({"own": "0::/a/b", "group/a/cpu.max": "200000 100000", "group/a/b/cpu.max": "max 100000"},
         2.0),
    ],
)  # fmt: skip
def test_a_quota_is_that_of_the_strictest_group(
    tell: Tell, files: dict[str, str], cpus: float | None
) -> None:
    tell(files)
    assert quota().cpus == cpus


@pytest.mark.parametrize(("threads", "cpus"), [(2, 64), (64, 2)])
def test_a_look_tells_what_was_taken_since_the_last(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, threads: int, cpus: int
) -> None:
    monkeypatch.setattr(environment.os, "cpu_count", lambda: cpus)
    clock = iter([0.0, 10.0, 20.0])
    tell({"group/cpu.max": "100000 100000", "stat": "cpu 10 0 0 90 0 0 0 0 0 0",
          "group/cpu.stat": "throttled_usec 1000000"})  # fmt: skip
    watch = MachineWatch(threads, lambda: next(clock))
    tell({"group/cpu.max": "50000 100000", "stat": "cpu 60 0 0 110 0 0 0 30 0 0",
          "group/cpu.stat": "throttled_usec 5000000"})  # fmt: skip
    assert watch.look() == pytest.approx(
        {"quota_cpus": 0.5, "quota_waiting_share": 0.2, "steal_share": 0.3}
    )
    # The second time no tick has passed.
    assert watch.look() == {"quota_cpus": 0.5, "quota_waiting_share": 0, "steal_share": None}


def states(count: int, **fields: float | bool | None) -> list[MachineState]:
    return [MachineState().model_copy(update=fields) for _ in range(count)]


@pytest.mark.usefixtures("tell")
def test_a_kernel_that_tells_nothing_is_no_reason_to_doubt() -> None:
    looks = states(5, **MachineWatch(2).look())
    assert doubt(looks) == ""
    assert machine_remarks(looks, 2) == []


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


CORES = "\n\n".join(
    f"processor\t: {number}\nmodel name\t: Test CPU 3000\nphysical id\t: 0\ncore id\t\t: {core}"
    for number, core in enumerate([0, 1, 0, 1])
)


@pytest.mark.parametrize(
    ("files", "allowed", "threads"),
    [
        ({"cpuinfo": CORES}, {0, 1, 2, 3}, 2),  # hyperthreads are no cores
        ({"cpuinfo": CORES}, {0, 2}, 1),
        ({"cpuinfo": CORES, "group/cpu.max": "100000 100000"}, {0, 1, 2, 3}, 1),
        ({"cpuinfo": CORES, "group/cpu.max": "max 100000"}, {0, 1, 2, 3}, 2),
        ({"cpuinfo": CORES, "group/cpu.max": "x"}, {0, 1, 2, 3}, 2),
        ({}, {0, 5, 7}, 3),
    ],
)
def test_threads_are_the_cores_that_may_be_used(
    tell: Tell, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], allowed: set[int],
    threads: int,
) -> None:  # fmt: skip
    tell(files)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: allowed)
    assert default_threads() == threads
    assert (processor_name() == "Test CPU 3000") == ("cpuinfo" in files)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the driver's tool be a script, which writes down how it was called."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
        path.chmod(0o755)

    return write


def test_a_gpu_is_named_only_by_the_driver_s_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Callable[[str], None]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "none"))
        assert gpu_name() is None
    tool("exit 9")
    assert gpu_name() is None
    tool("echo 'Test GPU, 600.1'")
    assert gpu_name() == "Test GPU, 600.1"
    with stand_in() as machine:  # the card that runs, not the first of the tool
        assert gpu_name() == "Test GPU, 600.1"
    assert f"--id={machine.uuid}" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("line", "throttled"),
    [
        ("0x0000000000000000, 97\n", False),
        ("0x0000000000000001, 0\n", None),  # idling
        ("0x0000000000000020, 99\n", True),
        ("0x0000000000000020, [N/A]\n", True),
        ("[N/A], 99\n", None),
        ("no devices were found\n", None),
    ],
)
def test_throttling_is_read(line: str, throttled: bool | None) -> None:
    assert throttled_in(line) is throttled


def test_the_gpu_is_looked_at_while_it_works(tool: Callable[[str], None]) -> None:
    lines = ["0x0, 90", "0x0, 0", "0x20, 95", "0x0, 90"]
    looked = "".join(f"{line}\\n" for line in lines)
    tool(f"printf '{looked}'; " + 'case "$*" in *--loop-ms*) exec sleep 60;; esac')
    with GpuWatch() as watch:
        while (seen := watch.throttled()) is None:
            time.sleep(0.05)
        assert watch.throttled() is None
    assert seen


MAPS = """\
555500000000-555500800000 rw-p 00000000 00:00 0                          [heap]
7f0000100000-7f0000900000 rw-p 00000000 00:00 0
7f0010000000-7f0010800000 r--p 00000000 00:00 0
7f0020000000-7f0020800000 rw-s 00000000 00:00 0
7f0030000000-7f0030800000 rw-p 00000000 fe:00 4711                       /some/where/weights.data
7f0040000000-7f0040200000 rw-p 00000000 00:00 0
7f0050100000-7f0050500000 rw-p 00000000 00:00 0
7fff00000000-7fff00800000 rw-p 00000000 00:00 0                          [stack]
"""


def test_whole_pages_of_large_private_regions_are_moved_and_stay_what_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    monkeypatch.setattr(base, "_ENABLED", enabled)  # tests of others move nothing
    assert list(private_regions(MAPS)) == [
        (0x555500000000, 0x555500800000),
        (0x7F0000200000, 0x7F0000800000),
    ]
    content = np.random.default_rng(0).bytes(4 * HUGE_PAGE_BYTES)
    with mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = content
        moved = move_to_huge_pages()
        assert moved % HUGE_PAGE_BYTES == 0
        assert memory[:] == content

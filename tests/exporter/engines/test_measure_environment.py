"""The machine's record, what else it does, and how many threads are taken by default."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.engines import environment as module
from exporter.engines.environment import (
    CpuTimes,
    GpuClocks,
    cpu_times,
    default_threads,
    environment,
    gpu_name,
    other_cpu_share,
    parse_clocks,
    processor_name,
)


def cpu(processor: int, socket: int, core: int) -> str:
    return (
        f"processor\t: {processor}\nmodel name\t: Test CPU 3000\n"
        f"physical id\t: {socket}\ncore id\t\t: {core}\n\n"
    )


@pytest.fixture
def four_threads_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("".join([cpu(0, 0, 0), cpu(1, 0, 1), cpu(2, 0, 0), cpu(3, 0, 1)]))
    monkeypatch.setattr(module, "_CPU_INFO", info)
    monkeypatch.setattr(module, "_CPU_QUOTA", tmp_path / "none")


def test_the_record_speaks_of_this_machine() -> None:
    found = environment(threads=3, gpu=False)
    assert found.threads == 3
    assert found.cpu_count >= 1
    assert found.memory_bytes > 2**28
    assert found.gpu is None
    assert found.processor


@pytest.mark.usefixtures("four_threads_two_cores")
def test_threads_are_cores_and_not_hyperthreads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_threads() == 2
    assert processor_name() == "Test CPU 3000"


@pytest.mark.usefixtures("four_threads_two_cores")
def test_threads_keep_to_the_cpus_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 2})
    assert default_threads() == 1


@pytest.mark.parametrize(("quota", "threads"), [("100000 100000", 1), ("max 100000", 2), ("x", 2)])
@pytest.mark.usefixtures("four_threads_two_cores")
def test_threads_keep_to_the_container_s_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(module, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_threads() == threads


def test_without_cpuinfo_the_allowed_cpus_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(module, "_CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 5, 7})
    assert default_threads() == 3


def test_a_gpu_is_named_only_by_the_driver_s_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_name() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Test GPU, 600.1'\n")
    tool.chmod(0o755)
    assert gpu_name() == "Test GPU, 600.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_name() is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1980, 41, 0x0000000000000000\n", GpuClocks(1980, 41, False)),
        ("345, 33, 0x0000000000000001\n", GpuClocks(345, 33, False)),  # idle
        ("1200, 87, 0x0000000000000020\n", GpuClocks(1200, 87, True)),
        ("[N/A], 41, [N/A]\n", GpuClocks(None, 41, None)),
        ("no devices were found\n", None),
    ],
)
def test_clocks_are_read(line: str, found: GpuClocks | None) -> None:
    assert parse_clocks(line) == found


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
    monkeypatch.setattr(module, "_KERNEL_COUNTERS", tmp_path / "stat")
    assert cpu_times() is None
    (tmp_path / "stat").write_text(text)
    assert cpu_times() is None


def test_the_kernel_s_line_is_read_by_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text("cpu  10 20 30 400 50 1 2 7 9 9\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(module, "_KERNEL_COUNTERS", tmp_path / "stat")
    monkeypatch.setattr(module.os, "sysconf", lambda _: 10)
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
    assert share > 0.05 / (module.os.cpu_count() or 1)

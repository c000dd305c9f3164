"""The machine's record, what else it does, and how many threads are taken by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.engines import environment as module
from exporter.engines.environment import (
    GpuClocks,
    default_threads,
    environment,
    gpu_name,
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

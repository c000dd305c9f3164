"""The machine's record, what else it does, and how many threads are taken by default."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from exporter.engines import environment as module
from exporter.engines import machine_watch
from exporter.engines.environment import (
    GpuClocks,
    GpuWatch,
    default_threads,
    environment,
    gpu_name,
    gpu_settings,
    parse_clocks,
    processor_name,
)
from tests.stand_in.installed import stand_in


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
    monkeypatch.setattr(machine_watch, "_CGROUP", tmp_path / "none")


def test_the_record_speaks_of_this_machine() -> None:
    result = environment(threads=3, gpu=False)
    assert result.threads == 3
    assert result.cpu_count >= 1
    assert result.memory_bytes > 2**28
    assert result.gpu is None
    assert result.processor


@pytest.mark.usefixtures("four_threads_two_cores")
def test_threads_are_cores_and_not_hyperthreads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_threads() == 2
    assert processor_name() == "Test CPU 3000"
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 2})
    assert default_threads() == 1


@pytest.mark.parametrize(("quota", "threads"), [("100000 100000", 1), ("max 100000", 2), ("x", 2)])
@pytest.mark.usefixtures("four_threads_two_cores")
def test_threads_keep_to_the_container_s_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine_watch, "_CGROUP", tmp_path)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_threads() == threads


def test_without_cpuinfo_the_allowed_cpus_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(machine_watch, "_CGROUP", tmp_path / "none")
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
    tool_that(tmp_path, monkeypatch, "echo 'Test GPU, 600.1'")
    with stand_in() as machine:  # the card that runs, not the first of the tool
        assert gpu_name() == "Test GPU, 600.1"
    assert f"--id={machine.uuid}" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1980, 41, 0x0000000000000000, 97\n", GpuClocks(1980, 41, False, True)),
        ("345, 33, 0x0000000000000001, 0\n", GpuClocks(345, 33, False, False)),
        ("1200, 87, 0x0000000000000020, 99\n", GpuClocks(1200, 87, True, True)),
        ("[N/A], 41, [N/A], [N/A]\n", GpuClocks(None, 41, None, None)),
        ("no devices were found\n", None),
    ],
)
def test_clocks_are_read(line: str, found: GpuClocks | None) -> None:
    assert parse_clocks(line) == found


STAYS = 'case "$*" in *--loop-ms*) exec sleep 60;; esac'


def tool_that(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Has the driver's tool be a script, which writes down how it was called."""
    tool = folder / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_settings_that_the_tool_does_not_know_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knows = {"power.limit": "300.00", "ecc.mode.current": "Enabled", "persistence_mode": "[N/A]"}
    cases = " ".join(f"--query-gpu={name}) echo '{know}';;" for name, know in knows.items())
    tool_that(tmp_path, monkeypatch, f'case "$1" in {cases} *) exit 2;; esac')
    assert gpu_settings() == {"power.limit": "300.00", "ecc.mode.current": "Enabled"}


def test_the_gpu_is_looked_at_while_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["1500, 60, 0x0, 90", "300, 50, 0x0, 0", "1400, 70, 0x20, 95", "1500, 65, 0x0, 90"]
    looked = "".join(f"{line}\\n" for line in lines)
    tool_that(tmp_path, monkeypatch, f"printf '{looked}'; {STAYS}")
    with GpuWatch() as watch:
        while (seen := watch.seen()) is None:
            time.sleep(0.05)
        assert watch.seen() is None
    assert seen == GpuClocks(1500, 70, True)

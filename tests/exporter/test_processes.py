"""Processes of our own end with the one that started them; what others take of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import processes
from exporter.processes import CpuTimes, child_command, cpu_times, other_cpu_share

_WORKER = """
import os, sys, time
from exporter.processes import end_with_parent
while not os.path.exists("go"):
    time.sleep(0.01)
end_with_parent(int(sys.argv[1]))
os.rename("writing", "written")
while True:
    time.sleep(0.01)
"""
_PARENT = """
import subprocess, sys
from exporter.processes import child_command
child = subprocess.Popen(child_command(["-c", sys.argv[1]]))
open("pid", "w").write(f"{child.pid}\\n")
child.wait()
"""


@pytest.fixture
def parent(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process with a child that waits for the file ``go``."""
    (tmp_path / "writing").touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    call = [sys.executable, "-c", _PARENT, _WORKER]
    started = subprocess.Popen(call, cwd=tmp_path, env=env)
    _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    return started


def _child(folder: Path) -> int:
    return int((folder / "pid").read_text())


def _wait(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_child_ends_when_its_parent_is_killed(
    parent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    _wait((tmp_path / "written").exists)
    assert not _is_gone(_child(tmp_path))
    parent.kill()
    parent.wait()
    _wait(lambda: _is_gone(_child(tmp_path)))


def test_a_child_whose_parent_was_killed_before_does_no_work(
    parent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    parent.kill()
    parent.wait()
    assert not _is_gone(_child(tmp_path))
    (tmp_path / "go").touch()
    _wait(lambda: _is_gone(_child(tmp_path)))
    assert (tmp_path / "writing").exists()


def test_the_command_tells_whose_child_it_is() -> None:
    assert child_command(["-P", "-m", "m"]) == [sys.executable, "-P", "-m", "m", str(os.getpid())]


def test_a_child_of_the_parent_that_it_was_told_of_goes_on() -> None:
    script = "import os, sys; from exporter.processes import end_with_parent;"
    script += "end_with_parent(int(sys.argv[1])); sys.exit(7)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(child_command(["-c", script]), env=env, check=False)
    assert ran.returncode == 7


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
    monkeypatch.setattr(processes, "_KERNEL_COUNTERS", tmp_path / "stat")
    assert cpu_times() is None
    (tmp_path / "stat").write_text(text)
    assert cpu_times() is None


def test_the_kernel_s_line_is_read_by_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text("cpu  10 20 30 400 50 1 2 7 9 9\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(processes, "_KERNEL_COUNTERS", tmp_path / "stat")
    monkeypatch.setattr(os, "sysconf", lambda _: 10)
    times = cpu_times()
    assert times is not None
    assert (times.total, times.busy) == (52.0, 7.0)


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
    assert share > 0.05 / (os.cpu_count() or 1)


def test_free_memory_is_below_what_the_machine_has_and_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = processes.available_bytes()
    if not sys.platform.startswith("linux"):
        assert whole is None
        return
    assert whole is not None
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(processes, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 400\n")
    assert processes.available_bytes() == 2400
    (tmp_path / "memory.max").write_text("max\n")
    assert processes.available_bytes() == pytest.approx(whole, rel=0.5)

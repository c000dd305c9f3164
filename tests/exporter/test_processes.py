"""Processes of our own end with the one that started them, even if it has ended before."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.processes import child_command

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

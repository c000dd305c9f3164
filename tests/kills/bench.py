"""Runs commands in forks of one process that has everything imported, and kills them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests import forked
from tests.kills.ticks import Kill, Ticks

Task = str | Callable[[], object]
"""A command line of `depthcut`, or a function."""

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST_S = 300.0
_PATIENCE_S = 3.0


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    count: int
    late: Sequence[int]
    seconds: float
    said: str
    left_running: bool


class Bench:
    """A folder in which commands run, one at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work, self.temporary = root / "work", root / "tmp"
        self.ticks = Ticks()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # waits for grandchildren, too
        for folder in (self.work, self.temporary, root / "cache", root / "home"):
            folder.mkdir(parents=True, exist_ok=True)

    def reset(self, template: Path) -> None:
        """Fills the folder with a copy, and empties the temporary one."""
        for folder in (self.work, self.temporary):
            shutil.rmtree(folder)
        shutil.copytree(template, self.work, symlinks=True)
        self.temporary.mkdir()

    def run(self, task: Task, kill: Kill | None = None) -> Ended:
        """Runs a command, and waits until it and all that it has started are gone."""

        def child() -> int:
            fork_workers()
            self.ticks.begin(kill)
            return forked.depthcut(task) if isinstance(task, str) else int(bool(task()))

        self.ticks.reset()
        said, begin = self.root / "said", time.monotonic()
        folders = {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "HOME": "home"}
        environment = {key: str(self.root / name) for key, name in folders.items()}
        pid = forked.start(child, self.work, (said, said), {**os.environ, **environment})
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        timed = kill if kill and not kill.at else None
        if not forked.ends(pid, timed.after_s if timed else _LONGEST_S):
            end = os.kill if timed and not timed.group else os.killpg
            end(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds, left = time.monotonic() - begin, self._left_running(pid)
        text = said.read_text(encoding="utf-8", errors="replace")
        return Ended(code, self.ticks.count, self.ticks.late, seconds, text, left)

    def _left_running(self, group: int) -> bool:
        """Waits for the rest of a group of processes; those that don't end by themselves are."""
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-group, os.WNOHANG)[0]:
                    pass
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-group, 0)
        return True


class ForkedWorker:
    """Stands in for the ``subprocess.Popen`` of a worker that speaks over its standard streams."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        from exporter.cli import sweep_cell

        to, back, parent = os.pipe(), os.pipe(), os.getpid()
        self.pid, self.returncode = os.fork(), None
        if not self.pid:
            code = 1
            try:
                os.dup2(to[0], 0)
                os.dup2(back[1], 1)
                for handle in (*to, *back):
                    os.close(handle)
                sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
                sys.argv = ["cell", str(parent), "-1"]
                code = sweep_cell.work()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(to[0])
        os.close(back[1])
        self.stdin = os.fdopen(to[1], "w", encoding="utf-8")
        self.stdout = os.fdopen(back[0], encoding="utf-8")

    returncode: int | None

    def __enter__(self) -> ForkedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.terminate(signal.SIGKILL)


def fork_workers() -> None:
    """Has a sweep fork its cells' processes from now on."""
    from exporter.pipeline.sweep import job

    vars(job)["subprocess"] = SimpleNamespace(
        Popen=ForkedWorker, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )

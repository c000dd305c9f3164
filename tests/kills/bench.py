"""Runs commands in forks of one process that has everything imported, and kills them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import exporter
from tests.kills.ticks import Kill, Ticks

Task = Sequence[str] | Callable[[], object]
"""The arguments of `depthcut`, or a function."""

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST_S = 300.0
_PATIENCE_S = 3.0
_LIBRARIES = (
    "numpy", "onnx", "onnx_ir", "onnx_ir.passes.common", "onnxruntime", "pydantic", "click",
    "rich.progress", "jinja2", "scipy.stats", "tokenizers",
)  # fmt: skip
_TORCH = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "onnxscript", "yaml",
    "transformers.models.auto.modeling_auto", "safetensors.torch", "torch.onnx",
    "torch.onnx._internal.exporter._core", "transformers.generation",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    count: int
    late: Sequence[int]
    seconds: float
    said: str
    left_running: bool


def warm_up() -> None:
    """Imports what commands need, but runs nothing."""
    sys.dont_write_bytecode = True
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_COLOR="1")
    for name in (*_LIBRARIES, *_TORCH):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    root = Path(exporter.__path__[0])
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        if not name.endswith(("__main__", ".worker")) and "entry_points" not in name:
            with contextlib.suppress(ImportError):
                importlib.import_module(name.removesuffix(".__init__"))
    gc.collect()
    gc.freeze()


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
        self.ticks.reset()
        begin = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            self._child(task, kill)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        status = self._waited(pid, kill)
        seconds = time.monotonic() - begin
        left = self._left_running(pid)
        said = (self.root / "said").read_text(encoding="utf-8", errors="replace")
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, self.ticks.count, self.ticks.late, seconds, said, left)

    def _child(self, task: Task, kill: Kill | None) -> None:
        code = 99
        try:
            os.setpgid(0, 0)
            said = os.open(self.root / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.close(said)
            os.chdir(self.work)
            os.environ.update(
                TMPDIR=str(self.temporary),
                XDG_CACHE_HOME=str(self.root / "cache"),
                HOME=str(self.root / "home"),
            )
            tempfile.tempdir = str(self.temporary)  # else Python tries it out, and may die at it
            fork_workers()
            self.ticks.begin(kill)
            code = done(task)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _waited(self, pid: int, kill: Kill | None) -> int:
        timed = kill is not None and not kill.at
        handle = os.pidfd_open(pid)
        try:
            if not select.select([handle], [], [], kill.after_s if timed and kill else _LONGEST_S)[
                0
            ]:
                os.killpg(pid, signal.SIGKILL) if not timed or (kill and kill.group) else os.kill(
                    pid, signal.SIGKILL
                )
        finally:
            os.close(handle)
        return os.waitpid(pid, 0)[1]

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


def done(task: Task) -> int:
    """Does it in this process, and gives its exit code."""
    if callable(task):
        code = task()
        return code if isinstance(code, int) else 0
    from exporter.cli import run

    sys.argv = ["depthcut", *task]
    return run(list(task))


class ForkedWorker:
    """Stands in for the ``subprocess.Popen`` of a worker that speaks over its standard streams."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        from exporter.pipeline.sweep import worker

        result, outcome, parent = os.pipe(), os.pipe(), os.getpid()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.dup2(result[0], 0)
                os.dup2(outcome[1], 1)
                for handle in (*result, *outcome):
                    os.close(handle)
                sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
                sys.argv = ["worker", str(parent)]
                code = worker.work()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(result[0])
        os.close(outcome[1])
        self.stdin = os.fdopen(result[1], "w", encoding="utf-8")
        self.stdout = os.fdopen(outcome[0], encoding="utf-8")
        self.returncode: int | None = None

    def __enter__(self) -> ForkedWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.pid, number)


def fork_workers() -> None:
    """Has a sweep fork its cells' processes from now on."""
    from exporter.pipeline.sweep import job as child

    names = {"Popen": ForkedWorker, "PIPE": subprocess.PIPE}
    names["TimeoutExpired"] = subprocess.TimeoutExpired
    vars(child)["subprocess"] = SimpleNamespace(**names)

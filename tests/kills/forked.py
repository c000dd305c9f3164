"""A sweep's cells in forks of the sweep's own process: the same two processes, begun at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace, TracebackType
from typing import Any


class ForkedWorker:
    """Stands in for the ``subprocess.Popen`` of a worker that speaks over its standard streams."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        from exporter.pipeline.sweep import worker
        from exporter.processes import end_with_parent

        asked, told, parent = os.pipe(), os.pipe(), os.getpid()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.dup2(asked[0], 0)
                os.dup2(told[1], 1)
                for handle in (*asked, *told):
                    os.close(handle)
                sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
                end_with_parent(parent)
                code = worker.main()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(asked[0])
        os.close(told[1])
        self.stdin = os.fdopen(asked[1], "w", encoding="utf-8")
        self.stdout = os.fdopen(told[0], encoding="utf-8")
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

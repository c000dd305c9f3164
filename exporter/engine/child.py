"""Runs the building process and listens to it; a crash in it becomes an error here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from exporter.engine.fixed_addresses import WORKER
from exporter.engine.flavours import Flavour
from exporter.errors import EngineError
from exporter.progress import Progress, Task

_LAST_WORDS = 2000
_PERCENT = 100


def run_job(
    flavour: Flavour, request: dict[str, Any], progress: Progress, what: str
) -> dict[str, Any]:
    """Has a process of its own do a job.

    Args:
        flavour: The library that it loads.
        request: The job; see :mod:`exporter.engine.worker`.
        progress: Sees a bar of a hundred steps.
        what: The bar's name.

    Returns:
        The job's result.

    Raises:
        EngineError: The job failed, or its process crashed.
    """
    with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
        path = Path(folder, "request.json")
        path.write_text(json.dumps({"backend": flavour.backend, **request}), encoding="utf-8")
        said = Path(folder, "said")
        with said.open("wb") as errors, progress.task(what, _PERCENT) as task:
            outcome, code = _listen([sys.executable, *WORKER, path], errors, task)
            words = said.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip()
            if words:
                progress.detail(words)
            return _result(outcome, code, flavour, words)  # within: what failed isn't done


def _listen(command: list[Any], errors: Any, task: Task) -> tuple[dict[str, Any], int]:
    outcome: dict[str, Any] = {}
    percent = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child:  # noqa: S603
        try:
            for line in child.stdout or ():
                event = json.loads(line)
                if "progress" in event:
                    reached = int(event["progress"] * _PERCENT)
                    task.advance(reached - percent)
                    percent = reached
                else:
                    outcome = event
        except BaseException:
            child.kill()
            raise
    task.advance(_PERCENT - percent)
    return outcome, child.returncode


def _result(outcome: dict[str, Any], code: int, flavour: Flavour, words: str) -> dict[str, Any]:
    if "result" in outcome and code == 0:
        result: dict[str, Any] = outcome["result"]
        return result
    if "error" in outcome:
        raise EngineError(outcome["error"]["message"], outcome["error"]["hint"])
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = "Memory may have run out." if code == -signal.SIGKILL else "See depthcut doctor."
        raise EngineError(f"{flavour.backend} crashed: its process {how}.", hint)
    last = words.splitlines()[-1] if words else f"exit code {code}"
    raise EngineError(f"{flavour.backend} failed: {last}")

"""What runs in a worker's process."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import socket
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import exporter
from exporter.errors import DepthcutError

Outcome = tuple[str, Any]
"""``done`` and a result, ``refused`` and a library error, or ``failed`` and a line, a traceback and
the host."""


def versions() -> dict[str, str]:
    """What has to be the same in all processes, by name; ``missing`` for what isn't there.

    Of depthcut also the hash of its code: a checkout has one version for many states.
    """
    texts = {"depthcut": _own_version(), "python": platform.python_version()}
    for name in ("numpy", "torch", "transformers"):
        try:
            texts[name] = version(name)
        except PackageNotFoundError:
            texts[name] = "missing"
    return texts


def _own_version() -> str:
    spec = importlib.util.find_spec("exporter")
    if spec is None or spec.origin is None:
        return "missing"
    root, digest = Path(spec.origin).parents[1], hashlib.sha256()
    for package in ("exporter", "graph_passes"):
        paths = (root / package).rglob("*.py")
        for path in sorted(item for item in paths if item.parent.name != "entry_points"):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{exporter.__version__} (code {digest.hexdigest()[:12]})"


class Worker:
    """One process with what it has set up, such as a loaded model."""

    def __init__(self, threads: int, foreign: str | None = None) -> None:
        sys.path[:] = [path for path in sys.path if path != foreign]
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)
        self._begun: Outcome | None = None

    def about(self) -> Outcome:
        """Where this runs and on what."""
        return "done", {"host": socket.gethostname(), "versions": versions()}

    def begin(self, setup: Callable[[], Any]) -> Outcome:
        """Sets up what all pieces of work need, once in a process."""
        if self._begun is None:
            self._begun = _outcome(setup)
        return self._begun if self._begun[0] != "done" else ("done", None)

    def do(self, setup: Callable[[], Any], work: Callable[[Any, Any], Any], job: Any) -> Outcome:
        """Does one piece of work; Ray may have started this process again since it has begun."""
        outcome = self.begin(setup)
        if outcome[0] != "done" or self._begun is None:
            return outcome
        state = self._begun[1]
        return _outcome(lambda: work(state, job))


def _outcome(call: Callable[[], Any]) -> Outcome:
    """The result, or what is to be told; an error of Ray's own would hide which it was."""
    try:
        return "done", call()
    except DepthcutError as error:
        return "refused", error
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(" .:")
        trace = "".join(traceback.format_exception(error))
        return "failed", (line, trace, socket.gethostname())

"""What runs in a worker's process."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import exporter
from exporter.errors import ClusterError


def versions() -> dict[str, str]:
    """What has to be the same in all processes, by name; ``missing`` for what isn't there.

    Other code may compute something else: sums of both would be of neither. A checkout of depthcut
    has one version for many states.
    """
    root, code = Path(exporter.__file__).parents[1], hashlib.sha256()
    paths = (path for name in ("exporter", "graph_passes") for path in (root / name).rglob("*.py"))
    for path in sorted(path for path in paths if path.parent.name != "entry_points"):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    texts = {"python": platform.python_version(), "depthcut's code": code.hexdigest()[:12]}
    for name in ("depthcut", "numpy", "torch", "transformers"):
        try:
            texts[name] = version(name)
        except PackageNotFoundError:
            texts[name] = "missing"
    return texts


class Worker:
    """One process with what it has set up, such as a loaded model."""

    def __init__(self, threads: int, foreign: str | None = None) -> None:
        sys.path[:] = [path for path in sys.path if path != foreign]
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)
        self._begun: tuple[Any, Any] | None = None

    def do(self, wanted: dict[str, str], refs: list[Any]) -> Any:
        """Does one piece of work, once what all pieces need is set up.

        refs: what sets up, and what works on that and a job; and the job.
        """
        import ray

        if self._begun is None:
            own = versions()
            differ = [f"{n} {own.get(n)} instead of {v}" for n, v in wanted.items()
                      if own.get(n) != v]  # fmt: skip
            if differ:
                raise ClusterError(
                    f"The worker on {socket.gethostname()} has {', '.join(differ)}.",
                    "Install the same versions on all machines of the cluster, and restart Ray "
                    "there.",
                    code="other-versions",
                )
            setup, work = ray.get(refs[0])
            self._begun = work, setup()
        work, state = self._begun
        return work(state, ray.get(refs[1]))

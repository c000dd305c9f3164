"""Cells spread over a Ray cluster, each with a machine for itself while it is timed."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from exporter.artifacts import SweepCell
from exporter.artifacts.ledger import FOLDER
from exporter.errors import SweepError
from exporter.files import write_text
from exporter.pipeline.sweep.child import run_in_child
from exporter.pipeline.sweep.job import Job
from exporter.progress import QUIET, Progress
from exporter.score.cluster.pool import open_pool


def run_on_ray(
    jobs: Sequence[Job], progress: Progress, *, address: str | None, workers: int | None = None
) -> Iterator[tuple[int, SweepCell]]:
    """Runs jobs on as many machines as there are.

    Args:
        jobs: The cells.
        progress: Hears of the cluster; what goes on in the cells stays on its machines.
        address: As :func:`exporter.score.cluster.pool.open_pool` takes it.
        workers: At most so many at once.

    Yields:
        Each job's place among them, and what came of it, as they come.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: There is no cluster, or it lost a cell again and again.
        SweepError: A machine doesn't see the sweep's folder.
    """
    if not jobs:
        return
    with (
        _token(Path(jobs[0].out)) as token,
        open_pool(address, workers=workers, whole_nodes=True, progress=progress) as pool,
    ):
        progress.say(f"cluster: a machine for each cell, {pool.workers} at once")
        yield from pool.run(partial(_ready, str(token)), _work, jobs)


@contextmanager
def _token(out: Path) -> Iterator[Path]:
    """A file in the sweep's folder by which another machine knows that it sees the same one."""
    path = out / FOLDER / f"seen-{secrets.token_hex(8)}"
    write_text(path, path.name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _ready(token: str) -> None:
    if not Path(token).is_file():
        raise SweepError(
            f"{socket.gethostname()} doesn't see the sweep's folder {Path(token).parents[1]}.",
            "Put the folder, and the models and texts, where all machines of the cluster see them "
            "under the same path.",
            code="folder-not-shared",
        )


def _work(_ready: None, job: Job) -> SweepCell:
    return run_in_child(job, QUIET)

"""Cells one after the other, each in a process of its own.

One that crashes, or is killed for its memory, is then a cell that failed; and none is timed in
memory that an earlier one has left in pieces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from exporter.artifacts import SweepCell
from exporter.errors import SweepError
from exporter.pipeline.children import run_child
from exporter.pipeline.sweep.job import Job, failed, missing
from exporter.progress import Progress

WORKER = ("-P", "-m", "exporter.pipeline.sweep.worker")
"""How Python starts it; ``-P`` keeps it from importing what lies in the folder that it is called
in."""


def run_in_children(jobs: Sequence[Job], progress: Progress) -> Iterator[tuple[int, SweepCell]]:
    """Runs jobs one after the other.

    Args:
        jobs: The cells.
        progress: Hears which one begins, and what goes on in it.

    Yields:
        Each job's place among them, and what came of it.

    Raises:
        OSError: The disk is full.
    """
    for place, job in enumerate(jobs):
        progress.say(f"sweep: {place + 1} of {len(jobs)}: {job} ...")
        yield place, run_in_child(job, progress)


def run_in_child(job: Job, progress: Progress) -> SweepCell:
    """Runs one job.

    Args:
        job: The cell.
        progress: Hears what goes on in it.

    Raises:
        OSError: The disk is full.
    """
    end = run_child(WORKER, job.to_json(), progress)
    if "cell" in end.word:
        return SweepCell.model_validate(end.word["cell"])
    if "full" in end.word:
        raise OSError(end.word["errno"], os.strerror(end.word["errno"]), end.word["full"])
    error = SweepError(f"The cell's process {end.told}.")
    return failed(missing(job.cell(), job.key), error.message, error, end.hint)

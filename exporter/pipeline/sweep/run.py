"""The whole sweep: what is kept, what is run, and one table at the end."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from exporter.artifacts import SweepCell, SweepReport
from exporter.artifacts.store import FOLDER, StageLedger, locked
from exporter.errors import ArtifactError, DepthcutError, SweepError
from exporter.files import write_text
from exporter.models.loading.checked_folder import Dangers
from exporter.pipeline.sweep.cells import (
    SHARED,
    Cell,
    cell_key,
    cells_of,
    drop_models,
    is_kept,
    source_hashes,
    write_plan,
)
from exporter.pipeline.sweep.job import Job, failed, missing, run_in_child, run_in_children
from exporter.pipeline.sweep.schema import Sweep
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from exporter.report.files import SWEEP_REPORTS, write_sweep
from exporter.score.cluster.pool import open_pool
from graph_passes.files.placing import refuse_outside, remove_tree

Runner = Callable[[Sequence[Job], Progress], Iterator[tuple[int, SweepCell]]]
"""Runs jobs, and gives what came of each with its place among them, in any order."""


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    runner: Runner = run_in_children,
    dangers: Dangers | None = None,
    force: bool = False,
    progress: Progress = QUIET,
) -> SweepReport:
    """Runs every cell that is missing, and writes one table of all.

    A cell is kept while all that it depends on is as it was; one that failed is tried again. The
    table is written after each cell, so that a sweep that is cut short leaves what it has.
    """
    cells = cells_of(sweep, out, dangers)
    _earlier(out)  # refuses another's table before anything is locked
    with locked(out):
        for own in cells:
            refuse_outside(out, own.request.out)
        table = _Table(sweep, out, cells, _known(out, cells, force=force))
        jobs = table.jobs(dangers or Dangers(), force=force)
        progress.say(_opening(table.found, len(jobs)))
        for cell in table.found:  # broken before it began
            if cell.failure is not None:
                progress.say(f"sweep: {_words(cell)}")
        for job in jobs:
            write_plan(cells[job.index])
        shared = out.resolve() / FOLDER / SHARED
        if force:
            remove_tree(shared)
        table.write()
        for number, (place, cell) in enumerate(runner(jobs, progress), start=1):
            own = cells[jobs[place].index]
            table.put(jobs[place].index, cell)
            if cell.status == "done":
                drop_models(own)
            progress.say(f"sweep: {number} of {len(jobs)}: {_words(cell)}")
        tidy(shared)
    return table.report()


def look(
    sweep: Sweep, out: Path, *, dangers: Dangers | None = None, force: bool = False
) -> SweepReport:
    """What a sweep would find and what it would still have to run; changes nothing."""
    cells = cells_of(sweep, out, dangers)
    return _Table(sweep, out, cells, _known(out, cells, force=force)).report()


class _Table:
    """All cells as far as they are known, in the order of the file."""

    def __init__(
        self, sweep: Sweep, out: Path, cells: Sequence[Cell], found: list[SweepCell]
    ) -> None:
        self._sweep, self._out, self._cells = sweep, out, cells
        self.found = found

    def jobs(self, dangers: Dangers, *, force: bool) -> list[Job]:
        """What is to be run; a cell whose model can't be read has failed already."""
        place = str(self._sweep.path.resolve()), self._sweep.text, str(self._out.resolve())
        return [
            Job(*place, index, own.request.source, own.name, cell.key, force, dangers)
            for index, (own, cell) in enumerate(zip(self._cells, self.found, strict=True))
            if cell.status == "missing"
        ]

    def put(self, index: int, cell: SweepCell) -> None:
        """Takes a cell's result in, and writes the table."""
        self.found[index] = cell
        self.write()

    def write(self) -> None:
        write_sweep(self.report(), self._out)

    def report(self) -> SweepReport:
        """The table."""
        reports = {cell.folder: cell.report_sha256 for cell in self.found if cell.report_sha256}
        return SweepReport(
            source=str(self._sweep.path),
            text=self._sweep.text,
            cells=list(self.found),
            made_from={"sweep": self._sweep.sha256, **reports},
        )


def _known(out: Path, cells: Sequence[Cell], *, force: bool) -> list[SweepCell]:
    """What earlier runs have left of each cell."""
    earlier, sha256, result = _earlier(out), source_hashes(), []
    for cell in cells:
        try:
            key = cell_key(cell, sha256(cell))
        except DepthcutError as error:
            result.append(failed(missing(cell, ""), error))
            continue
        kept = earlier.get(cell.folder)
        same = not force and is_kept(cell, key, kept)
        result.append(kept if kept is not None and same else missing(cell, key))
    return result


def _earlier(out: Path) -> dict[str, SweepCell]:
    """The cells of an earlier table by their folders; a table that is none of ours is refused."""
    hint = "Use another output folder."
    table = out / SWEEP_REPORTS[0]
    if table.exists():
        try:
            return {cell.folder: cell for cell in SweepReport.read(table).cells}
        except ArtifactError as error:
            raise SweepError(f"This is no table of a sweep: {error.message}", hint) from error
    for name in SWEEP_REPORTS[1:]:
        if (out / name).exists():
            raise SweepError(f"{out / name} was not written by depthcut sweep.", hint)
    return {}


def tidy(shared: Path) -> None:
    """Removes stages whose files no cell's folder holds any more, and half-kept ones.

    Nothing else may work in the folder.
    """
    for place in shared.glob("*"):
        files = (path for path in place.rglob("*") if path.is_file())
        if StageLedger(place).is_new or not any(path.stat().st_nlink > 1 for path in files):
            remove_tree(place)


def _opening(cells: Sequence[SweepCell], runs: int) -> str:
    done = sum(cell.status == "done" for cell in cells)
    broken = len(cells) - done - runs
    names = [f"{done} kept from earlier runs" if done else "", f"{runs} to run"]
    names += [f"{broken} that can't be run"] if broken else []
    return f"sweep: {counted(len(cells), 'cell')}: {', '.join(filter(None, names))}"


def _words(cell: SweepCell) -> str:
    name = f"{cell.model}, {cell.plan}, {cell.precision}"
    if cell.failure is not None:
        return f"{name} FAILED: {cell.failure.message}"
    return f"{name} done in {cell.seconds or 0:.0f} s"


def run_on_ray(
    jobs: Sequence[Job], progress: Progress, *, address: str | None, workers: int | None = None
) -> Iterator[tuple[int, SweepCell]]:
    """Runs jobs on as many machines as there are."""
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
    return run_in_child(job)

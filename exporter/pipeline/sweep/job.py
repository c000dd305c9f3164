"""One cell's work as plain text, which any process on any machine can take up."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from exporter.artifacts import ComparisonReport, SweepCell, SweepFailure
from exporter.errors import FULL_DISK, DepthcutError, SweepError, first_line
from exporter.files import sha256_file, telling_full_disk
from exporter.models.loading.checked_folder import Dangers
from exporter.pipeline.road import export_model
from exporter.pipeline.sweep.cells import Cell, cells_of
from exporter.pipeline.sweep.keeping import cell_key, source_hashes
from exporter.pipeline.sweep.reading import parse_sweep
from exporter.pipeline.sweep.results import result_of
from exporter.progress import Progress


@dataclass(frozen=True)
class Job:
    """A cell of a sweep.

    Attributes:
        file: The sweep's file, which names in it are relative to.
        text: What it held when the sweep began.
        out: The sweep's folder.
        index: Which of its cells.
        source: That cell's model, as it was found when the sweep began: a path where there is none
            any more must not become a hub id.
        name: What messages call that.
        key: The hash of what the cell depends on.
        force: Whether finished stages are made again.
        dangers: What the caller has switched on.
    """

    file: str
    text: str
    out: str
    index: int
    source: str
    name: str
    key: str
    force: bool = False
    dangers: Dangers = field(default_factory=Dangers)

    def __str__(self) -> str:
        return self.name

    def to_json(self) -> str:
        """As :meth:`from_json` takes it, on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What :meth:`to_json` gave."""
        told = json.loads(text)
        return cls(**{**told, "dangers": Dangers(**told["dangers"])})

    def cell(self) -> Cell:
        """The cell, as the pipeline takes it."""
        sweep = parse_sweep(self.text, Path(self.file))
        cell = cells_of(sweep, Path(self.out), self.dangers, look=False)[self.index]
        request = replace(cell.request, source=self.source, redo=self.force, allow_empty=self.force)
        return replace(cell, request=request)


def run_job(job: Job, progress: Progress) -> SweepCell:
    """Walks a cell's whole road.

    Returns:
        The cell, done or failed: a failure is a result, and the other cells go on.

    Raises:
        OSError: The disk is full; then the others would fail too.
    """
    cell, begin = job.cell(), time.monotonic()
    found = missing(cell, job.key)
    try:
        with telling_full_disk(cell.request.out):
            _refuse_changed(cell, job)
            report = export_model(cell.request, progress)
            found = _done(found, cell, report)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        found = failed(found, f"{error.strerror or error}{where}.", error)
    except DepthcutError as error:
        found = failed(found, error.message, error, error.hint)
    except MemoryError as error:
        found = failed(found, "The memory ran out.", error)
    except Exception as error:  # other cells may well go on
        progress.detail(traceback.format_exc())
        found = failed(found, f"Unexpected: {first_line(error)}.", error)
    return found.model_copy(update={"seconds": time.monotonic() - begin})


def _refuse_changed(cell: Cell, job: Job) -> None:
    """A result must not stand under the hash of what it wasn't made from.

    Raises:
        SweepError: The model, the plan or a text is another than when the sweep began.
    """
    if cell_key(cell, source_hashes()(cell)) != job.key:
        raise SweepError(
            "The model, the plan, a text or a library has changed since the sweep began.",
            "Run the sweep again; it takes what is there then.",
            code="input-changed",
        )


def missing(cell: Cell, key: str) -> SweepCell:
    """A cell that has no result yet."""
    return SweepCell(
        model=cell.model,
        plan=cell.plan,
        precision=cell.precision,
        folder=cell.folder,
        key=key,
        status="missing",
    )


def failed(
    found: SweepCell, message: str, error: BaseException, hint: str | None = None
) -> SweepCell:
    """The cell with what kept it from a result."""
    failure = SweepFailure(error=type(error).__name__, message=message, hint=hint or None)
    return found.model_copy(update={"status": "failed", "failure": failure})


def _done(found: SweepCell, cell: Cell, report: ComparisonReport) -> SweepCell:
    told = {
        "status": "done",
        "result": result_of(report),
        "report_sha256": sha256_file(cell.request.out / "report.json"),
    }
    return found.model_copy(update=told)

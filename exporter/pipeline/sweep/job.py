"""One cell's work as plain text, which any process on any machine can take up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from exporter.artifacts import (
    ComparisonReport,
    Corner,
    LatencyRow,
    SweepCell,
    SweepFailure,
    SweepResult,
    SweepShape,
)
from exporter.artifacts.figures import FIGURES
from exporter.errors import FULL_DISK, SweepError, plain_words
from exporter.files import sha256_file, telling_full_disk
from exporter.models.loading.checked_folder import Dangers
from exporter.pipeline.road import export_model
from exporter.pipeline.sweep.cells import Cell, cell_key, cells_of, source_hashes
from exporter.pipeline.sweep.schema import parse_sweep
from exporter.processes import child_command
from exporter.progress import Progress
from exporter.report.sections.verdict import notices
from exporter.report.words import named_arms, short_shape

WORKER = ("-P", "-m", "exporter.cli.sweep_cell")
"""How Python starts it; ``-P`` keeps it from importing what lies in the folder that it is called
in."""
_PATIENCE_S = 30.0
_SILENT = -1


def result_of(report: ComparisonReport) -> SweepResult:
    """The figures of a cell's report that the sweep's table has."""
    arms, whole, cut = report.arms, _corner(report), _corner(report, pruned=True, quantized=True)
    figures: dict[str, tuple[float | None, float]] = {}
    for figure in (figure for figure in FIGURES if figure.column):
        if whole and cut:
            if figure.key in cut.figures:
                figures[figure.key] = whole.figures.get(figure.key), cut.figures[figure.key]
        elif one := next(figure.readings(report.accuracy), None):
            figures[figure.key] = one.before, one.value
    return SweepResult(
        deletions=report.plan,
        shapes=[_shape(row, report) for row in report.latency],
        figures=figures,
        whole_bytes=named_arms(report)[whole.arm if whole else "baseline"].file_bytes,
        candidate_bytes=arms.candidate.file_bytes,
        precision=arms.candidate.precision,
        machine=report.environment.gpu or report.environment.processor,
        threads=report.environment.threads,
        notices=notices(report),
    )


def _shape(row: LatencyRow, report: ComparisonReport) -> SweepShape:
    cut = _corner(report, pruned=True, quantized=True)
    return SweepShape(
        name=short_shape(row),
        rounds=row.rounds,
        speedup=row.speedup,
        verdict=row.verdict,
        over_float=cut.speedups.get(row.shape_name) if cut else None,
    )


def _corner(
    report: ComparisonReport, *, pruned: bool = False, quantized: bool = False
) -> Corner | None:
    wanted = (pruned, quantized)
    return next((c for c in report.corners if (c.pruned, c.quantized) == wanted), None)


@dataclass(frozen=True)
class Job:
    """A cell of a sweep."""

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
        content = json.loads(text)
        return cls(**{**content, "dangers": Dangers(**content["dangers"])})

    def cell(self) -> Cell:
        """The cell, as the pipeline takes it."""
        sweep = parse_sweep(self.text, Path(self.file))
        cell = cells_of(sweep, Path(self.out), self.dangers, look=False)[self.index]
        request = replace(cell.request, source=self.source, redo=self.force, allow_empty=self.force)
        return replace(cell, request=request)


def run_job(job: Job, progress: Progress) -> SweepCell:
    """Walks a cell's whole road."""
    cell, begin = job.cell(), time.monotonic()
    result = missing(cell, job.key)
    try:
        with telling_full_disk(cell.request.out):
            if cell_key(cell, source_hashes()(cell)) != job.key:
                raise SweepError(  # no result may stand under the hash of what it wasn't made from
                    "The model, the plan, a text or a library has changed since the sweep began.",
                    "Run the sweep again; it takes what is there then.",
                    code="input-changed",
                )
            report = export_model(cell.request, progress)
            result = _done(result, cell, report)
    except Exception as error:  # other cells may well go on
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        progress.detail(traceback.format_exc())
        result = failed(result, error)
    return result.model_copy(update={"seconds": time.monotonic() - begin})


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


def failed(cell: SweepCell, error: BaseException) -> SweepCell:
    """The cell with what kept it from a result."""
    hint = getattr(error, "hint", None) or None
    failure = SweepFailure(error=type(error).__name__, message=plain_words(error), hint=hint)
    return cell.model_copy(update={"status": "failed", "failure": failure})


def _done(value: SweepCell, cell: Cell, report: ComparisonReport) -> SweepCell:
    result = {
        "status": "done",
        "result": result_of(report),
        "report_sha256": sha256_file(cell.request.out / "report.json"),
    }
    return value.model_copy(update=result)


def run_in_children(
    jobs: Sequence[Job], progress: Progress, verbosity: int = _SILENT
) -> Iterator[tuple[int, SweepCell]]:
    """Runs jobs one after the other; each says on standard error what it does."""
    for place, job in enumerate(jobs):
        progress.say(f"sweep: {place + 1} of {len(jobs)}: {job} ...")
        yield place, run_in_child(job, verbosity)


def run_in_child(job: Job, verbosity: int = _SILENT) -> SweepCell:
    """Runs one job in a process that is gone at the end."""
    path = os.pathsep.join(filter(None, sys.path))
    child = subprocess.Popen(  # noqa: S603
        [*child_command(WORKER), str(verbosity)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        encoding="utf-8",
    )
    with contextlib.suppress(BrokenPipeError), child:
        assert child.stdin
        assert child.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # its exit code says why
                child.stdin.write(job.to_json() + "\n")
                child.stdin.close()
            answer, code = child.stdout.read(), child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_PATIENCE_S)
            raise
        finally:
            child.kill()
    if answer.endswith("\n"):
        word = json.loads(answer)
        if "cell" in word:
            return SweepCell.model_validate(word["cell"])
        raise OSError(word["errno"], os.strerror(word["errno"]), word["full"])
    end = f"was killed: {signal.strsignal(-code)}" if code < 0 else f"ended with exit code {code}"
    hint = "Its memory may have run out." if code == -signal.SIGKILL else ""
    return failed(missing(job.cell(), job.key), SweepError(f"The cell's process {end}.", hint))

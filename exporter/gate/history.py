"""The history: one line of JSON a run, appended."""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from exporter.artifacts import (
    SCHEMA_VERSION,
    CheckReport,
    ComparisonReport,
    HistoryEntry,
    HistoryRow,
    json_path,
)
from exporter.errors import ArtifactError
from exporter.gate.keys import series
from graph_passes.files.reading import TABLE_BYTES, read_text

_MEND = "Mend or remove that line; the others are untouched."


def entry_of(
    report: ComparisonReport, found: CheckReport, *, commit: str | None, now: datetime | None = None
) -> HistoryEntry:
    """What the history keeps of a run."""
    return HistoryEntry(
        schema_version=SCHEMA_VERSION,
        time=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
        commit=commit,
        series=series(found.key),
        candidate_sha256=report.arms.candidate.sha256,
        verdict=found.verdict,
        rows=[
            HistoryRow(subject=row.shape_name, speedup=row.speedup.ratio, ci95=row.speedup.ci95)
            for row in report.latency
        ],
    )


def read_history(path: Path) -> list[HistoryEntry]:
    """Reads a history; empty where there is none.

    Raises:
        ArtifactError: A line can't be read. The text names it.
    """
    try:
        lines = read_text(path, limit=TABLE_BYTES, named=True).splitlines()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}.", _MEND) from error
    return [_read_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]


def append(path: Path, entry: HistoryEntry) -> None:
    """Adds a line, in one write, while no other process adds one.

    Raises:
        OSError: It can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(_separator(path) + entry.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _separator(path: Path) -> bytes:
    """A newline where the last line has none: somebody edited the file."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def _read_line(line: str, where: str) -> HistoryEntry:
    try:
        entry = HistoryEntry.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"{where}: {json_path(first['loc'])}: {first['msg']}.", _MEND
        ) from error
    if entry.schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{where}: $.schema_version is {entry.schema_version}; this depthcut reads up to "
            f"{SCHEMA_VERSION}.",
            "Update depthcut.",
        )
    return entry

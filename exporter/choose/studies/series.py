"""Scores a series point by point, keeps what is finished, and holds the points side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifacts import ImportanceReport, StabilityReport
from exporter.artifacts.ledger import StageLedger, locked
from exporter.choose.studies.stability import stability_of_files
from exporter.errors import UsageError
from exporter.progress import QUIET, Progress
from exporter.report.files import study_files, write_study

SCORES, STABILITY = "importance.json", "stability.json"
_UNSAFE = re.compile(r"[^\w.=-]+")


@dataclass(frozen=True)
class SeriesPoint:
    """A point that is to be scored.

    Attributes:
        name: Of its folder; no other point has it.
        key: Everything that its scores depend on.
        score: Scores it.
    """

    name: str
    key: Mapping[str, Any]
    score: Callable[[], ImportanceReport]


def score_series(
    points: Sequence[SeriesPoint], out: Path, *, progress: Progress = QUIET
) -> StabilityReport:
    """Scores all points and writes what they have in common.

    ``out`` gets a folder for each point with its importance.json as soon as that is finished, and
    ``stability.json`` with its tables and its page at the end. A point whose key and file are as
    they were is not scored again.

    Args:
        points: At least two, in their order.
        out: The folder.
        progress: Told which point is at work, and which is kept.

    Raises:
        UsageError: Another process works in the folder, or it holds something else where a point
            or the report is to stand.
        DepthcutError: A point can't be scored; what is finished stays.
    """
    with locked(out):
        ledger = StageLedger(out)
        _refuse_foreign(ledger, points, out)
        for number, point in enumerate(points, start=1):
            where = f"{point.name} ({number} of {len(points)})"
            if ledger.valid(point.name, point.key):
                progress.say(f"score: {where} is kept")
                continue
            progress.say(f"score: {where}")
            path = point.score().write(ledger.work / point.name / SCORES)
            ledger.record(point.name, point.key, [path])
            ledger.publish()
        ledger.publish()  # what an earlier call had scored when it was killed
        report = stability_of_files([out / point.name / SCORES for point in points])
        write_study(report, out / STABILITY)
    return report


def _refuse_foreign(ledger: StageLedger, points: Sequence[SeriesPoint], out: Path) -> None:
    """A point takes its folder's place as a whole, whatever is in there."""
    names = [point.name for point in points if not ledger.has(point.name)]
    if ledger.is_new:
        names += [path.name for path in study_files(out / STABILITY)]
    found = next((out / name for name in names if (out / name).exists()), None)
    if found is not None:
        raise UsageError(
            f"{found} is there and was not written by a series of scores.",
            "Use another output folder: -o.",
            code="not-ours",
        )


def folder_names(labels: Sequence[str]) -> list[str]:
    """Names of folders for labels that differ; they may hold anything."""
    names = [_UNSAFE.sub("-", label).strip("-.") or "point" for label in labels]
    taken: set[str] = set()
    found = []
    for name in names:
        number, free = 2, name
        while free in taken:
            number, free = number + 1, f"{name}-{number}"
        taken.add(free)
        found.append(free)
    return found

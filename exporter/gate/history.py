"""The history, one line of JSON a run, and what many runs tell that one doesn't."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import stats

from exporter.artifacts import (
    SCHEMA_VERSION,
    CheckReport,
    ComparisonReport,
    Drift,
    HistoryEntry,
    HistoryRow,
    KeyDifferences,
    json_path,
)
from exporter.artifacts.base import refuse_other_schema
from exporter.artifacts.store import in_turn
from exporter.errors import ArtifactError, RegressionError, UsageError
from exporter.gate.keys import differences, key_of, key_sha256, series
from exporter.printable import printable_json
from graph_passes.errors import UnsafeInputError
from graph_passes.files.placing import append as append_text
from graph_passes.files.reading import RECORD_BYTES, parse_json, read_bytes


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


@dataclass(frozen=True)
class HistoryFile:
    """A history as it was read."""

    entries: Sequence[HistoryEntry] = ()
    cut_off: Sequence[int] = ()


def read_history_file(path: Path) -> HistoryFile:
    """Reads a history; empty where there is none."""
    try:
        lines = read_bytes(path, limit=RECORD_BYTES, named=True).splitlines()
    except FileNotFoundError:
        return HistoryFile()
    entries = {n: _read_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line}
    cut_off = [number for number, entry in entries.items() if entry is None]
    return HistoryFile([entry for entry in entries.values() if entry is not None], cut_off)


def read_history(path: Path) -> list[HistoryEntry]:
    """The runs of a history; see :func:`read_history_file`."""
    return list(read_history_file(path).entries)


def append(path: Path, entry: HistoryEntry) -> None:
    """Adds a line, in one write, while no other process adds one; see :func:`refuse_link`."""
    refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(path.parent):
        separator = "\n" if path.exists() and not _is_ended(path) else ""
        append_text(path, f"{separator}{printable_json(entry.model_dump_json())}\n")


def refuse_link(path: Path) -> None:
    """Keeps what is written in the history's own folder."""
    if path.is_symlink():
        raise UsageError(
            f"{path} is a link, and a history is written in its own folder.",
            f"Name the file itself: {path.resolve()}, if it is yours.",
            code="linked-output",
        )


def _is_ended(path: Path) -> bool:
    """Whether the last line has its break: somebody may have edited the file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")


def _read_line(line: bytes, where: str) -> HistoryEntry | None:
    """A run; None where the line ends before its JSON does, as one that a crash cut off."""
    try:
        content = parse_json(line.decode(), where)
        if isinstance(content, dict):
            refuse_other_schema(content.get("schema_version"), where)
        return HistoryEntry.model_validate(content)
    except UnsafeInputError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        text = f"{json_path(first['loc'])}: {first['msg']}"
    except ValueError as error:
        if _is_cut_off(line):
            return None
        text = f"$: {error}"
    hint = "Mend or remove that line; the others are untouched."
    raise ArtifactError(f"{where}: {text}.", hint, code="broken-line")


def _is_cut_off(line: bytes) -> bool:
    """Whether it ends inside of its JSON, perhaps inside of a character."""
    try:
        json.loads(text := line.decode(errors="ignore"))
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated")
    return False


FEWEST = 8
"""Fewer runs say nothing of a trend."""
WINDOW = 30
_ERROR = 0.01  # how often independent noise alone may be called drift, of all shapes together
_FEWEST_REPEATS = 4


def drifts(entries: Sequence[HistoryEntry], series: str, *, least: float = 0.03) -> list[Drift]:
    """Slow changes for the worse."""
    curves = _curves([entry for entry in entries if entry.series == series])
    result = [_drift(subject, runs, _ERROR / len(curves)) for subject, runs in curves.items()]
    return [drift for drift in result if drift is not None and drift.total > 1 + least]


def session_spreads(
    entries: Sequence[HistoryEntry], series: str, candidate_sha256: str
) -> dict[str, float]:
    """How far the speedups of one and the same candidate differ from session to session.

    An interval within a session doesn't know what differs between sessions: where memory lies, how
    warm the machine is. From at least four sessions of this candidate it is known.

    By shape, the share that two sessions' ratio stays within in 95 % of all cases: the t
    quantile times the standard deviation of a difference, on logarithms.
    """
    mine = [e for e in entries if e.series == series and e.candidate_sha256 == candidate_sha256]
    spreads = {}
    for subject, runs in _curves(mine).items():
        if len(runs) >= _FEWEST_REPEATS:
            deviation = float(np.std([value for value, _ in runs], ddof=1))
            quantile = float(stats.t.ppf(0.975, len(runs) - 1))
            spreads[subject] = math.expm1(quantile * math.sqrt(2) * deviation)
    return spreads


_Runs = list[tuple[float, HistoryEntry]]


def _curves(entries: Sequence[HistoryEntry]) -> dict[str, _Runs]:
    """By shape, the logarithm of relative time of each run that has it; the newest."""
    curves: dict[str, _Runs] = {}
    for entry in entries:
        for row in entry.rows:
            if math.isfinite(row.speedup) and row.speedup > 0:
                curves.setdefault(row.subject, []).append((-math.log(row.speedup), entry))
    return {subject: runs[-WINDOW:] for subject, runs in curves.items()}


def _drift(subject: str, runs: _Runs, error: float) -> Drift | None:
    if len(runs) < FEWEST:
        return None
    values, order = np.array([value for value, _ in runs]), np.arange(len(runs))
    slope = stats.theilslopes(values, order).slope
    noise = math.sqrt(_variance_inflation(values - slope * order))
    p_value = stats.kendalltau(order, values, alternative="greater").pvalue
    if not stats.norm.isf(p_value) / noise > stats.norm.isf(error):
        return None
    return Drift(
        subject=subject,
        entries=len(runs),
        per_entry=float(slope),
        total=math.exp(float(slope) * (len(runs) - 1)),
        first=_run_name(runs[0][1]),
        last=_run_name(runs[-1][1]),
    )


def _variance_inflation(rest: NDArray[np.float64]) -> float:
    """How much more the sum of runs that resemble their neighbours varies than of independent."""
    centred = rest - rest.mean()
    power = float(centred @ centred)
    kept = float(centred[1:] @ centred[:-1]) / power if power else 0.0
    kept = min(max(kept, 0.0), 0.9)
    return (1 + kept) / (1 - kept)


def _run_name(entry: HistoryEntry) -> str:
    return entry.time if entry.commit is None else f"{entry.commit[:12]} ({entry.time})"


Named = dict[str, ComparisonReport]
"""Where each report lies, in words, and the report."""

_UPDATE = "Write one with --update-baseline, on the machine that runs the check."


def read_baselines(path: Path) -> Named:
    """Reads a baseline: a report, or a folder of some."""
    if path.exists() and not path.is_dir():
        return {str(path): ComparisonReport.read(path)}
    files = sorted(path.glob("*.json"))
    if not files:
        raise RegressionError(f"{path}: there is no baseline.", _UPDATE, code="no-baseline")
    return {str(file): ComparisonReport.read(file, named=False) for file in files}


def find_baseline(
    report: ComparisonReport, baselines: Named, allow: Collection[str] = ()
) -> tuple[ComparisonReport, KeyDifferences]:
    """The earlier report that a report may be held against."""
    key = key_of(report)
    result = [(differences(key_of(other), key), name) for name, other in baselines.items()]
    result.sort(key=lambda pair: len(pair[0]))
    fitting = [(item, name) for item, name in result if item.keys() <= set(allow)]
    if not fitting:
        raise _no_baseline(*result[0], len(result))
    best = [name for item, name in fitting if len(item) == len(fitting[0][0])]
    if len(best) > 1:
        raise RegressionError(
            f"{best[0]} and {best[1]} fit equally well.",
            "Keep one of them, or allow less.",
            code="several-baselines",
        )
    return baselines[best[0]], fitting[0][0]


def updated(path: Path, report: ComparisonReport) -> Path:
    """Puts a report in a file's place; in a folder in that of its key's, beside those of others."""
    # Asked so that the answer stays the same when another job makes the folder meanwhile.
    if path.is_file() or (path.suffix and not path.is_dir()):
        return report.write(path)
    digest = key_sha256(key_of(report))
    with in_turn(path):  # jobs that do so at the same time wait for one another
        there = read_baselines(path) if any(path.glob("*.json")) else {}
        mine = [name for name, old in there.items() if key_sha256(key_of(old)) == digest]
        return report.write(Path(mine[0]) if mine else path / f"{digest[:12]}.json")


def _no_baseline(nearest: KeyDifferences, name: str, count: int) -> RegressionError:
    others = "" if count == 1 else f" (the nearest of {count})"
    allow = " ".join(f"--allow {field}" for field in nearest)
    words = "; ".join(f"{name}: {old} there, {new} here" for name, (old, new) in nearest.items())
    return RegressionError(
        f"There is no baseline to compare with. {name}{others} was measured under other "
        f"conditions: {words}.",
        f"Write one for these conditions with --update-baseline, or accept the difference: "
        f"{allow}.",
        code="other-conditions",
    )

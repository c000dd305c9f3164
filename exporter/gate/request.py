"""`depthcut check` as a function: files in, a check out, the baseline and the history kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.artifacts import CheckReport, ComparisonReport, HistoryEntry
from exporter.errors import ArtifactError, RegressionError
from exporter.gate.gate import BaselineMatch, History, check, judged_models
from exporter.gate.history import (
    HistoryFile,
    append,
    drifts,
    entry_of,
    find_baseline,
    read_baselines,
    read_history,
    read_history_file,
    refuse_link,
    session_spreads,
    updated,
)
from exporter.gate.keys import FIELDS, key_of, refuse_unsound, series
from exporter.gate.limits import AGAINST_BASELINE, Limits
from exporter.option_types import InputFile, OutputPath, one_of
from exporter.options import Options, argument, dataclass, only_with, option, part

VERDICTS = "Baselines and verdicts"


@dataclass(frozen=True)
class CheckRequest(Options):
    """What to check, and what to keep."""

    section = VERDICTS
    report: InputFile = argument("REPORT")
    baseline: OutputPath | None = option(
        None,
        "An earlier report, or a folder of several. Without it the candidate is compared with its "
        "own unpruned baseline.",
    )
    limits: Limits = part(Limits())
    allow: tuple[one_of(FIELDS), ...] = option(  # type: ignore[valid-type]
        (),
        "Compare although this field differs from the baseline. Repeatable.",
        metavar="FIELD",
    )
    update_baseline: bool = option(
        False,
        "Make the report the baseline for its conditions, whatever the verdict; exit code 0.",
    )
    history: OutputPath | None = option(
        None,
        "JSON-lines file: the result is appended, and the file is checked for slow drift.",
        metavar="FILE",
    )
    commit: str | None = option(
        None,
        "Name of this run in the history.",
        metavar="NAME",
        usual="GITHUB_SHA or CI_COMMIT_SHA",
    )
    rules = (
        only_with("update_baseline", "baseline", hint="Name it with {1}."),
        only_with("allow", "baseline", hint="Name it with {1}."),
    )


def run_check(request: CheckRequest) -> tuple[CheckReport, ComparisonReport]:
    """Checks a report, then appends to the history and renews the baseline, where asked."""
    report = ComparisonReport.read(request.report)
    refuse_unsound(report, str(request.report))
    history = _history(request, report)
    baseline = _baseline(request, report)
    if baseline is None and request.update_baseline:
        result = _first(report)
    else:
        result = check(
            report, request.limits, baseline=baseline, history=history, name=str(request.report)
        )
    if request.history is not None:
        _remember(request.history, entry_of(report, result, commit=request.commit))
    if request.update_baseline:
        assert request.baseline is not None
        written = updated(request.baseline, report)
        result = _noting(result, f"This report is the baseline of its key from now on: {written}.")
    return result, report


def _remember(history: Path, entry: HistoryEntry) -> None:
    """Appends a run, unless it is there: a report that is checked twice is one run."""
    if not _holds(read_history(history), entry):
        append(history, entry)


def _holds(entries: Sequence[HistoryEntry], entry: HistoryEntry) -> bool:
    runs = [(old.candidate_sha256, old.rows) for old in entries]
    return (entry.candidate_sha256, entry.rows) in runs


def _history(request: CheckRequest, report: ComparisonReport) -> History:
    """The runs before this one tell how sessions differ; with this one, whether there is drift."""
    if request.history is None:
        return History()
    refuse_link(request.history)
    kept, mine = read_history_file(request.history), series(key_of(report))
    entries = list(kept.entries)
    now = entry_of(report, _first(report), commit=request.commit)
    runs = entries if _holds(entries, now) else [*entries, now]
    limits = AGAINST_BASELINE if request.limits.max_slowdown is None else request.limits
    return History(
        spreads=session_spreads(entries, mine, report.arms.candidate.sha256),
        drift=drifts(runs, mine, least=limits.max_slowdown or 0.0),
        notes=_history_notes(request.history, kept, mine),
    )


def _history_notes(path: Path, kept: HistoryFile, mine: str) -> list[str]:
    others = sum(entry.series != mine for entry in kept.entries)
    cut_off = ", ".join(map(str, kept.cut_off))
    return [
        *(
            [f"{others} of {len(kept.entries)} runs in {path} are of other machines, models or "
             "settings: they are not looked at here."]
            if others else []
        ),
        *([f"{path}: what is cut off is left out: line {cut_off}."] if cut_off else []),
    ]  # fmt: skip


_FIRST = ("no-baseline", "other-conditions", "other-schema")
"""What is no hindrance where the report is to become a baseline."""


def _baseline(request: CheckRequest, report: ComparisonReport) -> BaselineMatch | None:
    if request.baseline is None:
        return None
    try:
        baselines = read_baselines(request.baseline)
        return BaselineMatch(*find_baseline(report, baselines, request.allow))
    except (RegressionError, ArtifactError) as error:
        if request.update_baseline and error.code in _FIRST:
            return None
        raise


def _first(report: ComparisonReport) -> CheckReport:
    return CheckReport(
        verdict="within_limit",
        against="baseline_report",
        models=judged_models(report, None),
        key=key_of(report),
        checks=[],
        notes=["There was no earlier report of this key; nothing was checked."],
    )


def _noting(report: CheckReport, note: str) -> CheckReport:
    return report.model_copy(update={"notes": [*report.notes, note]})

"""`depthcut check` as a function: files in, a check out, the baseline and the history kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exporter.artifacts import CheckReport, ComparisonReport, HistoryEntry
from exporter.errors import RegressionError, UsageError
from exporter.gate.baselines import find_baseline, read_baselines, updated
from exporter.gate.gate import BaselineMatch, History, check, confirmed, is_in_doubt
from exporter.gate.history import append, drifts, entry_of, read_history, session_spreads
from exporter.gate.keys import key_of, series
from exporter.gate.limits import AGAINST_BASELINE, Limits
from exporter.gate.sanity import refuse_unsound

Remeasure = Callable[[], ComparisonReport]
"""Times a report's own arms once more, with its own options."""


@dataclass(frozen=True)
class CheckRequest:
    """What to check, and what to keep.

    Attributes:
        report: The new report.
        baseline: An earlier one, a file with several, or a folder; None checks the candidate
            against its own unpruned arm.
        limits: What is checked.
        allow: Fields of the key in which the baseline may differ.
        update_baseline: Whether the report becomes the baseline of its key, whatever the verdict.
        confirm: How often a regression of time is measured again before it is believed.
        history: The file to append to, of which drift is told.
        commit: What the history calls this run.
    """

    report: Path
    baseline: Path | None = None
    limits: Limits = field(default_factory=Limits)
    allow: tuple[str, ...] = ()
    update_baseline: bool = False
    confirm: int = 0
    history: Path | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        if self.baseline is None and (self.update_baseline or self.allow):
            raise UsageError(
                "--update-baseline and --allow speak of a baseline, but none is named.",
                "Name it with --baseline.",
            )


def run_check(
    request: CheckRequest, remeasure: Callable[[ComparisonReport], Remeasure] | None = None
) -> tuple[CheckReport, ComparisonReport]:
    """Checks a report, then appends to the history and renews the baseline, where asked.

    Args:
        request: What to check.
        remeasure: Makes what measures a report's arms again; needed where ``confirm`` is above 0.

    Returns:
        What was found, and the report that it was found in.

    Raises:
        UsageError: The request makes no sense.
        ArtifactError: A file can't be read.
        RegressionError: There is no baseline for this report, or nothing can be concluded.
    """
    report = ComparisonReport.read(request.report)
    refuse_unsound(report, str(request.report))
    history = _history(request, report)
    baseline = _baseline(request, report)
    if baseline is None and request.update_baseline:
        found = _first(report)
    else:
        found = check(
            report, request.limits, baseline=baseline, history=history, name=str(request.report)
        )
        found = _confirm(request, report, baseline, history, found, remeasure)
    if request.history is not None:
        _remember(request.history, entry_of(report, found, commit=request.commit))
    if request.update_baseline:
        assert request.baseline is not None
        written = updated(request.baseline, report)
        found = _noting(found, f"This report is the baseline of its key from now on: {written}.")
    return found, report


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
    entries, mine = read_history(request.history), series(key_of(report))
    now = entry_of(report, _first(report), commit=request.commit)
    runs = entries if _holds(entries, now) else [*entries, now]
    least = request.limits.max_slowdown or AGAINST_BASELINE.max_slowdown or 0.0
    return History(
        spreads=session_spreads(entries, mine, report.arms.candidate.sha256),
        drift=drifts(runs, mine, least=least),
    )


def _baseline(request: CheckRequest, report: ComparisonReport) -> BaselineMatch | None:
    if request.baseline is None:
        return None
    try:
        baselines = read_baselines(request.baseline)
        return BaselineMatch(*find_baseline(report, baselines, request.allow))
    except RegressionError:
        if request.update_baseline and not _clashes(request, report):
            return None
        raise


def _clashes(request: CheckRequest, report: ComparisonReport) -> bool:
    """Whether the baseline is broken or double, so that it can't simply be added to."""
    assert request.baseline is not None
    if not request.baseline.exists() or _is_empty_folder(request.baseline):
        return False
    keys = [key_of(other) for other in read_baselines(request.baseline).values()]
    return keys.count(key_of(report)) > 1


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.json"))


def _first(report: ComparisonReport) -> CheckReport:
    return CheckReport(
        verdict="unchanged",
        against="baseline_report",
        key=key_of(report),
        checks=[],
        notes=["There was no earlier report of this key; nothing was checked."],
    )


def _confirm(
    request: CheckRequest,
    report: ComparisonReport,
    baseline: BaselineMatch | None,
    history: History,
    found: CheckReport,
    remeasure: Callable[[ComparisonReport], Remeasure] | None,
) -> CheckReport:
    if not request.confirm or not is_in_doubt(found):
        return found
    if remeasure is None:
        raise UsageError("There is nothing to measure again with.")
    measure = remeasure(report)
    limits = _time_only(request.limits, baseline)

    def again() -> CheckReport:
        return check(
            measure(), limits, baseline=baseline, history=history, name="the new measurement"
        )

    return confirmed(found, again, measurements=request.confirm)


def _time_only(limits: Limits, baseline: BaselineMatch | None) -> Limits:
    slowdown = limits.max_slowdown
    if limits.empty and baseline is not None:
        slowdown = AGAINST_BASELINE.max_slowdown
    return Limits(
        max_slowdown=slowdown, min_speedup=limits.min_speedup, noise_floor=limits.noise_floor
    )


def _noting(found: CheckReport, note: str) -> CheckReport:
    return found.model_copy(update={"notes": [*found.notes, note]})

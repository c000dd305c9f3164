"""What GitHub Actions shows: annotations, and the summary of a step.

Workflow commands are lines of the log. In a message ``%``, CR and LF are escaped, in a property
also ``:`` and ``,``; else a foreign text could end the command or begin one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from exporter.artifacts import CheckReport, CheckVerdict
from exporter.printable import one_line
from exporter.report.check_page import history_grid
from exporter.report.checks import (
    VERDICT_WORDS,
    check_grid,
    check_name,
    check_sentence,
    conclusion,
    curve_name,
    drift_sentence,
    is_new,
    model_lines,
    point_sentence,
    reasons,
    steps_of,
    work_sentence,
)
from exporter.report.markdown import escaped, table_lines
from exporter.report.words import WORK

_ANNOTATED: tuple[CheckVerdict, ...] = ("regressed", "inconclusive")
_MARKS = {"regressed": "❌", "inconclusive": "❔", "improved": "✅", "within_limit": "✅"}


def annotation_lines(found: CheckReport, *, inconclusive_fails: bool = False) -> list[str]:
    """A line for each regression, check without a verdict, drift, new step and change of work.

    A change of work that is beyond its limit, and its step in the history, have one line.
    """
    unsure = "error" if inconclusive_fails else "warning"
    levels = {"regressed": "error", "inconclusive": unsure}
    lines = [
        _command(levels[check.verdict], check_name(check), check_sentence(check))
        for check in found.checks
        if check.verdict in levels
    ]
    return [*lines, *(_command("warning", *warning) for warning in _warnings(found))]


def _warnings(found: CheckReport) -> Iterator[tuple[str, str]]:
    """Titles and messages; of steps those of the last runs, for the worse."""
    limited = {check.quantity for check in found.checks if check.verdict in _ANNOTATED}
    changed = {change.figure for change in found.work}
    for drift in found.drift:
        yield f"{drift.subject}: drift", drift_sentence(drift)
    for curve, point in steps_of(found):
        told_below = curve.subject in changed and point.run == len(curve.runs) - 1
        if is_new(curve, point) and point.size > 1 and not told_below:
            yield f"{curve_name(curve)}: step", point_sentence(curve, point)
    for change in (each for each in found.work if each.figure not in limited):
        yield f"{WORK[change.figure]}: changed", work_sentence(change)


def summary(found: CheckReport, title: str = "depthcut check") -> str:
    """Markdown for ``$GITHUB_STEP_SUMMARY``, and for a comment on a pull request."""
    grid, models = check_grid(found), model_lines(found)
    rows = [
        [*row[:-1], f"{_MARKS[check.verdict]} {VERDICT_WORDS[check.verdict]}"]
        for row, check in zip(grid.rows, found.checks, strict=True)
    ]
    lines = [
        f"## {escaped(title)}",
        "",
        f"**{escaped(conclusion(found))}**",
        "",
        *([*(f"- {escaped(line)}" for line in models), ""] if models else []),
        *table_lines(replace(grid, rows=rows)),
        "",
        *(f"- {escaped(line)}" for line in reasons(found)),
        *_history(found),
    ]
    return "\n".join(lines) + "\n"


def _history(found: CheckReport) -> list[str]:
    grid = history_grid(found)
    return ["", *table_lines(grid)] if grid.rows else []


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return one_line(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

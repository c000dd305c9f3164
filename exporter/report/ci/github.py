"""What GitHub Actions shows: annotations, and the summary of a step.

Workflow commands are lines of the log. In a message ``%``, CR and LF are escaped, in a property
also ``:`` and ``,``; else a foreign text could end the command or begin one of its own.
"""

from __future__ import annotations

from dataclasses import replace

from exporter.artifacts import CheckReport
from exporter.printable import one_line
from exporter.report.checks import (
    VERDICT_WORDS,
    check_grid,
    check_name,
    check_sentence,
    conclusion,
    drift_sentence,
    reasons,
    work_sentence,
)
from exporter.report.markdown import escaped, table_lines
from exporter.report.words import WORK

_MARKS = {"regressed": "❌", "inconclusive": "❔", "improved": "✅", "within_limit": "✅"}


def annotation_lines(found: CheckReport, *, inconclusive_fails: bool = False) -> list[str]:
    """A line for each regression, each check without a verdict, each drift, each change of work."""
    unsure = "error" if inconclusive_fails else "warning"
    levels = {"regressed": "error", "inconclusive": unsure}
    lines = [
        _command(levels[check.verdict], check_name(check), check_sentence(check))
        for check in found.checks
        if check.verdict in levels
    ]
    return (
        lines
        + [
            _command("warning", f"{drift.subject}: drift", drift_sentence(drift))
            for drift in found.drift
        ]
        + [
            _command("warning", f"{WORK[change.figure]}: changed", work_sentence(change))
            for change in found.work
        ]
    )


def summary(found: CheckReport) -> str:
    """Markdown for ``$GITHUB_STEP_SUMMARY``."""
    grid = check_grid(found)
    rows = [
        [*row[:-1], f"{_MARKS[check.verdict]} {VERDICT_WORDS[check.verdict]}"]
        for row, check in zip(grid.rows, found.checks, strict=True)
    ]
    lines = [
        "## depthcut check",
        "",
        f"**{escaped(conclusion(found))}**",
        "",
        *table_lines(replace(grid, rows=rows)),
        "",
        *(f"- {escaped(line)}" for line in reasons(found)),
    ]
    return "\n".join(lines) + "\n"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return one_line(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

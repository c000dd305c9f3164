"""What GitHub Actions shows: annotations, and the summary of a step.

Workflow commands are lines of the log. In a message ``%``, CR and LF are escaped, in a property
also ``:`` and ``,``; else a foreign text could end the command or begin one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.artifacts import CheckReport
from exporter.printable import one_line
from exporter.report.checks import (
    CHECK_HEADER,
    check_name,
    check_rows,
    check_sentence,
    conclusion,
    drift_sentence,
)
from exporter.report.markdown_text import escaped

_MARKS = {"regressed": "❌", "inconclusive": "❔", "improved": "✅", "unchanged": "✅"}


def annotation_lines(found: CheckReport, *, inconclusive_fails: bool = False) -> list[str]:
    """A line for each regression, each check without a verdict, and each drift."""
    unsure = "error" if inconclusive_fails else "warning"
    levels = {"regressed": "error", "inconclusive": unsure}
    lines = [
        _command(levels[check.verdict], check_name(check), check_sentence(check))
        for check in found.checks
        if check.verdict in levels
    ]
    return lines + [
        _command("warning", f"{drift.subject}: drift", drift_sentence(drift))
        for drift in found.drift
    ]


def summary(found: CheckReport) -> str:
    """Markdown for ``$GITHUB_STEP_SUMMARY``."""
    rows = [(*row[:-1], f"{_MARKS[row[-1]]} {row[-1]}") for row in check_rows(found)]
    lines = [
        "## depthcut check",
        "",
        f"**{escaped(conclusion(found))}**",
        "",
        _row(CHECK_HEADER),
        _row(["---", "---:", "---:", "---:", "---:", "---"]),
        *(_row(row) for row in rows),
    ]
    told = [
        *(f"{check_name(c)}: {c.reason}" for c in found.checks if c.reason),
        *(f"Drift. {drift_sentence(drift)}" for drift in found.drift),
        *(
            f"Accepted difference. {d.field}: {d.baseline} there, {d.report} here."
            for d in found.accepted_differences
        ),
        *found.notes,
    ]
    return "\n".join([*lines, "", *(f"- {escaped(line)}" for line in told)]) + "\n"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return one_line(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"

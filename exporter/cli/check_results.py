"""What `depthcut check` prints, and the files that it writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import CheckReport, ComparisonReport
from exporter.cli.console import echo, echo_command, echo_json
from exporter.report.ci import FORMATS, Checked, write_ci_file

if TYPE_CHECKING:
    from exporter.gate import CheckRequest


def refuse_outputs(request: CheckRequest, options: Mapping[str, Any]) -> None:
    """Keeps what is written from taking the place of what is read.

    Raises:
        UsageError: An output is the report or belongs to the baseline.
    """
    from exporter.files import refuse_overwriting

    read = [request.report, *([request.baseline] if request.baseline else [])]
    files = ["output", *(each.name for each in FORMATS if not each.is_folder)]
    for name in files:
        if options[name] is not None:
            refuse_overwriting(options[name], read)
    if request.history is not None:  # may lie in the baseline's folder, as no report
        refuse_overwriting(request.history, [path for path in read if path.is_file()])
    if request.update_baseline and request.baseline is not None and request.baseline.is_file():
        refuse_overwriting(request.baseline, [request.report])


def write_outputs(found: CheckReport, report: ComparisonReport, options: Mapping[str, Any]) -> None:
    """Writes each file that was asked for."""
    from exporter.files import write_text

    if options["output"] is not None:
        write_text(options["output"], found.to_json())
    checked = Checked(found, report, inconclusive_fails=options["inconclusive"] == "fail")
    for each in FORMATS:
        if options[each.name] is not None:
            write_ci_file(each.name, options[each.name], checked)


def print_check(
    found: CheckReport, *, as_json: bool, on_github: bool | None, options: Mapping[str, Any]
) -> None:
    """The whole check as JSON, or a table and what is to be said; GitHub's lines beside either."""
    if as_json:
        echo_json(found.to_json())
    else:
        _print_table(found)
    if on_github is None:
        on_github = os.environ.get("GITHUB_ACTIONS") == "true"
    if on_github:
        _tell_github(found, fails=options["inconclusive"] == "fail", on_stderr=as_json)


def _print_table(found: CheckReport) -> None:
    from exporter.cli.results import print_rows
    from exporter.report.checks import check_grid, conclusion, reasons

    grid = check_grid(found)
    if found.checks:
        print_rows(grid.header, grid.rows)
        echo()
    for line in reasons(found):
        echo(line)
    if found.checks:
        echo(conclusion(found))


def _tell_github(found: CheckReport, *, fails: bool, on_stderr: bool) -> None:
    from exporter.report.ci.github import annotation_lines, summary

    for line in annotation_lines(found, inconclusive_fails=fails):
        echo_command(line, err=on_stderr)
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(found))

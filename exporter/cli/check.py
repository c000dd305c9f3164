"""`depthcut check`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from exporter.artifacts import CheckReport, ComparisonReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_command, echo_json
from exporter.cli.remeasure import remeasuring
from exporter.cli.results import print_rows
from exporter.files import refuse_overwriting, write_text
from exporter.gate.request import VERDICTS, CheckRequest
from exporter.option_types import OutputPath
from exporter.options import Options, dataclass, option, part
from exporter.report.checks import check_grid, conclusion, reasons
from exporter.report.ci import FORMATS, Checked, CiFormat, write_ci_file
from exporter.report.ci.github import annotation_lines, summary

PASSED, REGRESSED, INCONCLUSIVE = 0, 1, 3
_OUTPUTS = "Outputs"


def _ci_option(form: CiFormat) -> Any:
    metavar = "FOLDER" if form.is_folder else "FILE"
    rare = form is not FORMATS[0]
    return option(None, form.help, metavar=metavar, section=_OUTPUTS, rare=rare)


_CiFiles = dataclass(frozen=True)(
    type(
        "_CiFiles",
        (Options,),
        {
            "__annotations__": {each.name: OutputPath | None for each in FORMATS},
            **{each.name: _ci_option(each) for each in FORMATS},
        },
    )
)
"""Where each format's file goes, as the registry has them."""


@dataclass(frozen=True, kw_only=True)
class CheckCall(Options):
    """What `depthcut check` is asked to do."""

    request: CheckRequest = part()
    inconclusive: Literal["pass", "fail", "3"] = option(
        "3", "What not knowing counts as: exit code 0, 1 or 3.", section=VERDICTS
    )
    output: OutputPath | None = option(
        None, "The whole check as JSON.", "-o", "--output", section=_OUTPUTS
    )
    files: _CiFiles = part(_CiFiles())  # type: ignore[valid-type]
    github: bool | None = option(
        None,
        "Annotations and a step summary.",
        usual="on where GITHUB_ACTIONS is true",
        section=_OUTPUTS,
    )


@command(CheckCall)
def check(call: CheckCall, progress: ConsoleProgress) -> int:
    """Hold REPORT, a report.json, against limits: has the candidate become slower, worse, larger?

    Against a baseline without limits: at most 3 % more time, 1 % more perplexity, size and memory.

    Exit code 0 when all limits hold, 1 for a regression, 3 when the measurement can't tell, 2 for
    everything else.
    """
    from exporter.gate.request import run_check

    _refuse_outputs(call)
    commit = call.request.commit or os.environ.get("GITHUB_SHA") or os.environ.get("CI_COMMIT_SHA")
    request = replace(call.request, commit=commit)
    found, measured = run_check(request, lambda report: remeasuring(report, progress))
    _write_outputs(call, found, measured)
    if progress.as_json:
        echo_json(found.to_json())
    else:
        _print_table(found)
    if call.github or (call.github is None and os.environ.get("GITHUB_ACTIONS") == "true"):
        _tell_github(found, fails=call.inconclusive == "fail", on_stderr=progress.as_json)
    return _exit_code(call, found)


def _exit_code(call: CheckCall, found: CheckReport) -> int:
    if call.request.update_baseline:
        return PASSED
    if found.verdict == "inconclusive":
        return {"pass": PASSED, "fail": REGRESSED, "3": INCONCLUSIVE}[call.inconclusive]
    return REGRESSED if found.verdict == "regressed" else PASSED


def _refuse_outputs(call: CheckCall) -> None:
    """Keeps what is written from taking the place of what is read.

    Raises:
        UsageError: An output is the report or belongs to the baseline.
    """
    request = call.request
    read = [request.report, *([request.baseline] if request.baseline else [])]
    files = [getattr(call.files, each.name) for each in FORMATS if not each.is_folder]
    for path in filter(None, [call.output, *files]):
        refuse_overwriting(path, read)
    if request.history is not None:  # may lie in the baseline's folder, as no report
        refuse_overwriting(request.history, [path for path in read if path.is_file()])
    if request.update_baseline and request.baseline is not None and request.baseline.is_file():
        refuse_overwriting(request.baseline, [request.report])


def _write_outputs(call: CheckCall, found: CheckReport, report: ComparisonReport) -> None:
    """Writes each file that was asked for."""
    if call.output is not None:
        write_text(call.output, found.to_json())
    checked = Checked(found, report, inconclusive_fails=call.inconclusive == "fail")
    for each in FORMATS:
        if (path := getattr(call.files, each.name)) is not None:
            write_ci_file(each.name, path, checked)


def _print_table(found: CheckReport) -> None:
    grid = check_grid(found)
    if found.checks:
        print_rows(grid.header, grid.rows)
        echo()
    for line in reasons(found):
        echo(line)
    if found.checks:
        echo(conclusion(found))


def _tell_github(found: CheckReport, *, fails: bool, on_stderr: bool) -> None:
    for line in annotation_lines(found, inconclusive_fails=fails):
        echo_command(line, err=on_stderr)
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(found))

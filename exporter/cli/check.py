"""`depthcut check`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from exporter.artifacts import CheckReport, ComparisonReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo_command
from exporter.cli.results import print_result, table_lines
from exporter.files import refuse_overwriting, write_text, write_texts
from exporter.gate.request import VERDICTS, CheckRequest
from exporter.option_types import OutputPath
from exporter.options import Options, dataclass, option, part
from exporter.report.ci import (
    annotation_lines,
    check_grid,
    comment,
    conclusion,
    github_benchmark,
    junit,
    model_lines,
    reasons,
    summary,
)

PASSED, REGRESSED, INCONCLUSIVE = 0, 1, 3
_OUTPUTS = "Outputs"


@dataclass(frozen=True, kw_only=True)
class CheckCall(Options):
    """What `depthcut check` is asked to do."""

    section = _OUTPUTS
    request: CheckRequest = part()
    inconclusive: Literal["pass", "fail", "3"] = option(
        "3", "Exit code if the measurement can't decide: 0, 1 or 3.", section=VERDICTS
    )
    output: OutputPath | None = option(None, "The whole check as JSON.", "-o", "--output")
    junit: OutputPath | None = option(None, "JUnit XML.", metavar="FILE")
    github_benchmark: OutputPath | None = option(
        None,
        "smaller.json and bigger.json for github-action-benchmark.",
        metavar="FOLDER",
        rare=True,
    )
    comment: OutputPath | None = option(
        None, "Markdown for a comment on a pull request.", metavar="FILE", rare=True
    )
    github: bool | None = option(
        None, "Write annotations and a step summary.", usual="on if GITHUB_ACTIONS is true"
    )


@command(CheckCall)
def check(call: CheckCall, progress: ConsoleProgress) -> int:
    """Check REPORT, a report.json, against limits: is the candidate slower, worse or larger?

    With a baseline and no limits: at most 3 % more time, 1 % more perplexity, size and memory.

    Exit code 0 when all limits hold, 1 for a regression, 3 when the measurement can't tell, 2 for
    everything else.
    """
    from exporter.gate.request import run_check

    _refuse_outputs(call)
    commit = call.request.commit or os.environ.get("GITHUB_SHA") or os.environ.get("CI_COMMIT_SHA")
    request = replace(call.request, commit=commit)
    result, measured = run_check(request)
    _write_outputs(call, result, measured)
    print_result(result, progress.as_json, *_lines(result))
    if call.github or (call.github is None and os.environ.get("GITHUB_ACTIONS") == "true"):
        _tell_github(result, fails=call.inconclusive == "fail", on_stderr=progress.as_json)
    return _exit_code(call, result)


def _exit_code(call: CheckCall, report: CheckReport) -> int:
    if call.request.update_baseline:
        return PASSED
    if report.verdict == "inconclusive":
        return {"pass": PASSED, "fail": REGRESSED, "3": INCONCLUSIVE}[call.inconclusive]
    return REGRESSED if report.verdict == "regressed" else PASSED


def _refuse_outputs(call: CheckCall) -> None:
    """Keeps what is written from taking the place of what is read."""
    request = call.request
    read = [request.report, *([request.baseline] if request.baseline else [])]
    for path in filter(None, [call.output, call.junit, call.comment]):
        refuse_overwriting(path, read)
    if request.history is not None:  # may lie in the baseline's folder, as no report
        refuse_overwriting(request.history, [path for path in read if path.is_file()])
    if request.update_baseline and request.baseline is not None and request.baseline.is_file():
        refuse_overwriting(request.baseline, [request.report])


def _write_outputs(call: CheckCall, value: CheckReport, report: ComparisonReport) -> None:
    """Writes each file that was asked for."""
    fails = call.inconclusive == "fail"
    if call.output is not None:
        write_text(call.output, value.to_json())
    if call.junit is not None:
        write_text(call.junit, junit(value, inconclusive_fails=fails))
    if call.comment is not None:
        write_text(call.comment, comment(value, report))
    if call.github_benchmark is not None:
        texts = github_benchmark(report)
        write_texts({call.github_benchmark / name: text for name, text in texts.items()})


def _lines(report: CheckReport) -> list[str]:
    grid, models = check_grid(report), model_lines(report)
    lines = [*models, ""] if models else []
    if report.checks:
        lines += [*table_lines(grid.header, grid.rows), ""]
    return [*lines, *reasons(report), *([conclusion(report)] if report.checks else [])]


def _tell_github(report: CheckReport, *, fails: bool, on_stderr: bool) -> None:
    for line in annotation_lines(report, inconclusive_fails=fails):
        echo_command(line, err=on_stderr)
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(report))

"""`depthcut check`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from exporter.artifacts import CheckReport, ComparisonReport
from exporter.cli.command import command
from exporter.cli.compare import CompareCall
from exporter.cli.compare import compare as compare_command
from exporter.cli.console import ConsoleProgress, echo, echo_command, echo_json
from exporter.cli.export import export
from exporter.cli.results import print_rows
from exporter.compare.options import QualityOptions
from exporter.errors import RegressionError, UsageError
from exporter.files import refuse_overwriting, write_text, write_texts
from exporter.gate.keys import difference_words, differences, key_of
from exporter.gate.request import VERDICTS, CheckRequest
from exporter.models.encoder_decoder_folder import holds_stacks
from exporter.option_types import OutputPath
from exporter.options import Options, dataclass, option, part
from exporter.report.checks import check_grid, conclusion, model_lines, reasons
from exporter.report.ci import annotation_lines, comment, github_benchmark, junit, summary

PASSED, REGRESSED, INCONCLUSIVE = 0, 1, 3
_OUTPUTS = "Outputs"


@dataclass(frozen=True, kw_only=True)
class CheckCall(Options):
    """What `depthcut check` is asked to do."""

    request: CheckRequest = part()
    inconclusive: Literal["pass", "fail", "3"] = option(
        "3", "Exit code if the measurement can't decide: 0, 1 or 3.", section=VERDICTS
    )
    output: OutputPath | None = option(
        None, "The whole check as JSON.", "-o", "--output", section=_OUTPUTS
    )
    junit: OutputPath | None = option(None, "JUnit XML.", metavar="FILE", section=_OUTPUTS)
    github_benchmark: OutputPath | None = option(
        None,
        "smaller.json and bigger.json for github-action-benchmark.",
        metavar="FOLDER",
        section=_OUTPUTS,
        rare=True,
    )
    comment: OutputPath | None = option(
        None,
        "Markdown for a comment on a pull request.",
        metavar="FILE",
        section=_OUTPUTS,
        rare=True,
    )
    github: bool | None = option(
        None,
        "Write annotations and a step summary.",
        usual="on if GITHUB_ACTIONS is true",
        section=_OUTPUTS,
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
    for path in filter(None, [call.output, call.junit, call.comment]):
        refuse_overwriting(path, read)
    if request.history is not None:  # may lie in the baseline's folder, as no report
        refuse_overwriting(request.history, [path for path in read if path.is_file()])
    if request.update_baseline and request.baseline is not None and request.baseline.is_file():
        refuse_overwriting(request.baseline, [request.report])


def _write_outputs(call: CheckCall, found: CheckReport, report: ComparisonReport) -> None:
    """Writes each file that was asked for."""
    fails = call.inconclusive == "fail"
    if call.output is not None:
        write_text(call.output, found.to_json())
    if call.junit is not None:
        write_text(call.junit, junit(found, inconclusive_fails=fails))
    if call.comment is not None:
        write_text(call.comment, comment(found, report))
    if call.github_benchmark is not None:
        texts = github_benchmark(report)
        write_texts({call.github_benchmark / name: text for name, text in texts.items()})


def _print_table(found: CheckReport) -> None:
    grid, models = check_grid(found), model_lines(found)
    if models:
        echo(*models, "")
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


_ARMS = ("baseline", "candidate")
_FEW_TOKENS = 16  # the answers aren't in doubt, only the times
_NO_ANSWERS = QualityOptions(agreement_prompts=0, answer_tokens=0)


def remeasuring(
    report: ComparisonReport, progress: ConsoleProgress
) -> Callable[[], ComparisonReport]:
    """What times the report's arms again.

    Raises:
        UsageError: The report wasn't written by ``depthcut compare`` or ``export``.
    """
    from exporter.compare.kinds import ArmName
    from exporter.compare.session import compare

    asked = _asked(report)
    in_stacks = holds_stacks(ArmName.of(asked.baseline).path)
    # Which lengths are usual may have changed since.
    lengths = sorted({row.sequence_length for row in report.latency if row.phase == "encode"})
    keeps = bool(lengths) and not in_stacks
    options = replace(
        asked.compare,
        prefill_lengths=tuple(lengths) if keeps else asked.compare.prefill_lengths,
        threads=report.environment.threads,
        eval_tokens=_FEW_TOKENS,
        quality=QualityOptions() if in_stacks else _NO_ANSWERS,  # those always answer
    )

    def measure() -> ComparisonReport:
        progress.say("check: a regression; measuring again")
        again = compare(
            asked.baseline,
            asked.candidate,
            options,
            references=asked.references,
            also=asked.also,
            floats=asked.floats,
            onnx=asked.onnx,
            progress=progress,
        )
        _refuse_others(report, again)
        return again

    return measure


def _asked(report: ComparisonReport) -> CompareCall:
    """What the report's own command has asked for, as one of ``depthcut compare``."""
    command = report.command
    if command[:1] not in (["depthcut"], ["__main__.py"]) or command[1:2] not in (
        ["compare"], ["export"],
    ):  # fmt: skip
        raise UsageError(
            "The report doesn't say with which options it was measured: it was not written by "
            "depthcut compare or export.",
            "Leave --confirm out, or measure with depthcut compare.",
        )
    try:
        if command[1] == "compare":
            call = compare_command.read(command[2:])
            return replace(call, floats=call.floats or report.floats)
        request = export.read(command[2:]).request
        return CompareCall(
            baseline=report.arms.baseline.path,
            candidate=report.arms.candidate.path,
            output=request.out,
            also=tuple(report.also),
            floats=report.floats,
            compare=request.compare,
        )
    except (click.ClickException, UsageError) as error:
        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise UsageError(
            f"The report's own command can't be repeated: {told}",
            "Leave --confirm out, or measure again with depthcut compare.",
        ) from error


def _refuse_others(report: ComparisonReport, again: ComparisonReport) -> None:
    """Only the same files, run in the same way, can confirm anything."""
    for name in _ARMS:
        before, after = getattr(report.arms, name), getattr(again.arms, name)
        if before.sha256 != after.sha256:
            raise RegressionError(
                f"{before.path} is not the file that the report was made from.",
                "Compare again; a regression can only be confirmed on the same files.",
                code="other-files",
            )
    found = [one for one in differences(key_of(report), key_of(again)) if one.field != "text"]
    if found:
        raise RegressionError(
            "The second measurement ran under other conditions than the report's: "
            f"{difference_words(found)}.",
            "Measure with depthcut compare on the machine that checks, or leave --confirm out.",
        )

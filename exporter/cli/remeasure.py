"""Measures a report's own arms once more, with the options of the command that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from exporter.artifacts import ComparisonReport
from exporter.cli.compare import compare as compare_command
from exporter.cli.console import ConsoleProgress
from exporter.cli.export import export
from exporter.compare.options import CompareOptions, QualityOptions
from exporter.errors import RegressionError, UsageError
from exporter.gate.keys import difference_words, differences, key_of

_ARMS = ("baseline", "candidate")
_FEW_TOKENS = 16  # the answers aren't in doubt, only the times


@dataclass(frozen=True)
class _Asked:
    """What was compared, and how."""

    options: CompareOptions
    baseline: str
    candidate: str
    references: tuple[str, ...]
    floats: tuple[str, str] | None
    onnx: tuple[Path, Path] | None


def remeasuring(
    report: ComparisonReport, progress: ConsoleProgress
) -> Callable[[], ComparisonReport]:
    """What times the report's arms again.

    Raises:
        UsageError: The report wasn't written by ``depthcut compare`` or ``export``, or another
            tool took its times.
    """
    from exporter.compare.session import compare

    if any(row.imported for row in report.latency):
        raise UsageError(
            "These times were taken by another tool: nothing here can take them again.",
            "Leave --confirm out, and let that tool measure again.",
        )
    asked = _asked(report)
    found = report.environment.thread_probe is not None
    options = replace(
        asked.options,
        threads=report.environment.threads if found else asked.options.threads,
        eval_tokens=_FEW_TOKENS,
        quality=QualityOptions(agreement_prompts=0),
    )

    def measure() -> ComparisonReport:
        progress.say("check: a regression; measuring again")
        again = compare(
            asked.baseline,
            asked.candidate,
            options,
            references=asked.references,
            floats=asked.floats,
            onnx=asked.onnx,
            progress=progress,
        )
        _refuse_others(report, again)
        return again

    return measure


def _floats(report: ComparisonReport) -> tuple[str, str] | None:
    """Where the models in float lie that ``depthcut export`` timed beside the quantised ones."""
    names = [corner.arm for corner in report.corners if not corner.quantized]
    paths = [report.arms.references[name].path for name in names]
    return (paths[0], paths[1]) if paths else None


def _asked(report: ComparisonReport) -> _Asked:
    """What the report's own command has asked for."""
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
            floats = call.floats or _floats(report)
            paths = call.baseline, call.candidate
            return _Asked(call.compare, *paths, call.references, floats, call.onnx)
        request = export.read(command[2:]).request
        arms = report.arms
        paths = arms.baseline.path, arms.candidate.path
        return _Asked(request.compare, *paths, (), _floats(report), None)
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
                f"{before.path} is another file than the one that the report was made from.",
                "Compare again; a regression can only be confirmed on the same files.",
            )
    found = [one for one in differences(key_of(report), key_of(again)) if one.field != "text"]
    if found:
        raise RegressionError(
            f"The second measurement ran otherwise than the report's: {difference_words(found)}.",
            "Measure with depthcut compare on the machine that checks, or leave --confirm out.",
        )

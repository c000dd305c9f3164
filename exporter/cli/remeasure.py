"""Measures a report's own arms once more, with the options of the command that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.errors import RegressionError, UsageError

if TYPE_CHECKING:
    from exporter.artifacts import ComparisonReport

_ARMS = ("baseline", "candidate")
_FEW_TOKENS = 16  # the answers aren't in doubt, only the times


def remeasuring(
    report: ComparisonReport, progress: ConsoleProgress
) -> Callable[[], ComparisonReport]:
    """What times the report's arms again.

    Raises:
        UsageError: The report wasn't written by ``depthcut compare`` or ``export``, or another
            tool took its times.
    """
    from exporter.cli.requests import compare_options
    from exporter.compare import QualityOptions, compare

    if any(row.imported for row in report.latency):
        raise UsageError(
            "These times were taken by another tool: nothing here can take them again.",
            "Leave --confirm out, and let that tool measure again.",
        )
    parameters = _parameters(report.command)
    asked = compare_options(parameters)
    found = report.environment.thread_probe is not None
    options = replace(
        asked,
        threads=report.environment.threads if found else asked.threads,
        eval_tokens=_FEW_TOKENS,
        quality=QualityOptions(agreement_prompts=0),
    )
    paths = [parameters.get(name, getattr(report.arms, name).path) for name in _ARMS]

    def measure() -> ComparisonReport:
        progress.say("check: a regression; measuring again")
        again = compare(
            paths[0],
            paths[1],
            options,
            references=parameters.get("references", ()),
            floats=parameters.get("floats") or _floats(report),
            onnx=parameters.get("onnx") or None,
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


def _parameters(command: list[str]) -> dict[str, Any]:
    from exporter.cli.compare import compare
    from exporter.cli.export import export

    commands = {"compare": compare, "export": export}
    known = commands.get(command[1]) if len(command) > 1 else None
    if known is None or command[0] not in ("depthcut", "__main__.py"):
        raise UsageError(
            "The report doesn't say with which options it was measured: it was not written by "
            "depthcut compare or export.",
            "Leave --confirm out, or measure with depthcut compare.",
        )
    try:
        context = known.make_context(command[1], command[2:], obj=ConsoleProgress())
    except click.ClickException as error:
        raise UsageError(
            f"The report's own command can't be repeated: {error.format_message()}",
            "Leave --confirm out, or measure again with depthcut compare.",
        ) from error
    return context.params


def _refuse_others(report: ComparisonReport, again: ComparisonReport) -> None:
    """Only the same files, run in the same way, can confirm anything."""
    from exporter.gate.keys import difference_words, differences, key_of

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

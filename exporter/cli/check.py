"""`depthcut check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.check_options import judging, limit_options, output_options
from exporter.cli.console import ConsoleProgress
from exporter.cli.options import ANY_PATH, EXISTING_FILE, json_option, verbosity_options
from exporter.cli.sections import SectionedCommand

if TYPE_CHECKING:
    from exporter.artifacts import CheckReport
    from exporter.gate import CheckRequest

PASSED, REGRESSED, INCONCLUSIVE = 0, 1, 3


@click.command(cls=SectionedCommand, short_help="Hold a report against limits: a gate for CI.")
@click.argument("report", type=EXISTING_FILE)
@judging(
    "--baseline", type=ANY_PATH,
    help="An earlier report, a file with several, or a folder. Without it the candidate is held "
    "against its own unpruned arm.",
)  # fmt: skip
@limit_options
@output_options
@json_option
@verbosity_options
@click.pass_obj
def check(
    progress: ConsoleProgress, /, report: Path, baseline: Path | None, as_json: bool, **options: Any
) -> None:
    """Hold REPORT, a report.json, against limits: has the candidate become slower, worse, larger?

    Against a baseline without limits: at most 3 % more time, 1 % more perplexity, size and memory.

    Exit code 0 when all limits hold, 1 for a regression, 3 when the measurement can't tell, 2 for
    everything else.
    """
    from exporter.cli.check_results import print_check, refuse_outputs, write_outputs
    from exporter.cli.remeasure import remeasuring
    from exporter.gate import run_check

    request = _request(report, baseline, options)
    refuse_outputs(request, options)
    found, measured = run_check(request, lambda report: remeasuring(report, progress))
    write_outputs(found, measured, options)
    print_check(found, as_json=as_json, on_github=options["github"], options=options)
    click.get_current_context().exit(_exit_code(found, request, options["inconclusive"]))


def _request(report: Path, baseline: Path | None, options: dict[str, Any]) -> CheckRequest:
    from dataclasses import fields

    from exporter.gate import CheckRequest, Limits

    names = [field.name for field in fields(Limits)]
    given = {name: options[name] for name in names if options[name] is not None}
    return CheckRequest(
        report=report,
        baseline=baseline,
        limits=Limits(**given),
        allow=options["allow"],
        update_baseline=options["update_baseline"],
        confirm=options["confirm"],
        history=options["history"],
        commit=options["commit"] or os.environ.get("GITHUB_SHA") or os.environ.get("CI_COMMIT_SHA"),
    )


def _exit_code(found: CheckReport, request: CheckRequest, inconclusive: str) -> int:
    if request.update_baseline:
        return PASSED
    if found.verdict == "inconclusive":
        return {"pass": PASSED, "fail": REGRESSED, "3": INCONCLUSIVE}[inconclusive]
    return REGRESSED if found.verdict == "regressed" else PASSED

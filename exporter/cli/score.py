"""`depthcut score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.metric_options import metric_options
from exporter.cli.options import (
    ANY_FILE,
    EXISTING_FILE,
    json_option,
    model_options,
    scoring_options,
    verbosity_options,
)
from exporter.cli.sections import SectionedCommand


@click.command(
    cls=SectionedCommand, short_help="Measure how redundant each attention, MLP and block is."
)
@click.argument("model", required=False)
@click.option(
    "-o", "--output", type=ANY_FILE, help="The file. [importance.json; with --compare: none]"
)
@click.option(
    "--compare", type=EXISTING_FILE, nargs=2, metavar="FILE FILE",
    help="Score nothing: tell how far the rankings of two importance.json of one model agree.",
)  # fmt: skip
@metric_options
@scoring_options
@model_options
@json_option
@verbosity_options
@click.pass_obj
def score(
    progress: ConsoleProgress,
    /,
    model: str | None,
    output: Path | None,
    compare: tuple[Path, Path] | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Lower scores are more redundant,
    whatever the metric.
    """
    from exporter.errors import UsageError

    if (model is None) == (compare is None):
        raise UsageError("Say what to score: MODEL.", "Or which two files to hold side by side.")
    if compare is not None:
        _refuse_idle(options)
        _compare(*compare, output, as_json)
    elif model is not None:
        _score(progress, model, output or Path("importance.json"), as_json, options)


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """Refuses what only scoring would heed."""
    from exporter.errors import UsageError

    context = click.get_current_context()
    given = click.core.ParameterSource.COMMANDLINE
    for param in context.command.params:
        if param.name in options and context.get_parameter_source(param.name) is given:
            raise UsageError(
                f"{param.opts[0]} is for scoring, and --compare scores nothing.", "Leave it away."
            )


def _score(
    progress: ConsoleProgress, model: str, output: Path, as_json: bool, options: dict[str, Any]
) -> None:
    from exporter.cli.results import print_artifact
    from exporter.cli.score_runs import scored
    from exporter.files import refuse_overwriting
    from exporter.report.words import significant

    refuse_overwriting(output, map(Path, filter(None, (model, options["calibration"]))))
    report = scored(model, options, progress)
    report.write(output)
    lowest = sorted((s for s in report.scores if s.kind != "block"), key=lambda s: s.score)[:5]
    line = "Most redundant: " + ", ".join(
        f"{s.kind} {s.layer} ({significant(s.score, 3)})" for s in lowest
    )
    by = f" by {report.metric}" if report.further else ""
    print_artifact(report, output, as_json, line.replace(":", f"{by}:", 1))


def _compare(first: Path, second: Path, output: Path | None, as_json: bool) -> None:
    from exporter.cli.results import print_rows
    from exporter.files import refuse_overwriting
    from exporter.importance.comparison import compare_files, comparison_rows

    if output is not None:
        refuse_overwriting(output, [first, second])
    comparison = compare_files(first, second)
    if output is not None:
        comparison.write(output)
    if as_json:
        click.echo(comparison.to_json(), nl=False)
    else:
        print_rows(*comparison_rows(comparison))

"""`depthcut score`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from exporter.cli.cluster_options import one_cluster, ray_options
from exporter.cli.console import ConsoleProgress, echo_json
from exporter.cli.metric_options import metric_options
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    json_option,
    model_options,
    scoring_options,
    verbosity_options,
)
from exporter.cli.sections import SectionedCommand
from exporter.cli.series_options import asks_for_series, given_options, series_options
from exporter.cli.stream_options import stream_options


@click.command(
    cls=SectionedCommand, short_help="Measure how redundant each attention, MLP and block is."
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "-o", "--output", type=ANY_PATH,
    help="The file; of a series, the folder. [importance.json; importance; with --compare: none]",
)  # fmt: skip
@click.option(
    "--compare", type=EXISTING_FILE, nargs=2, metavar="FILE FILE",
    help="Score nothing: tell how far the rankings of two importance.json of one model agree.",
)  # fmt: skip
@metric_options
@scoring_options
@series_options
@stream_options
@model_options
@ray_options
@json_option
@verbosity_options
@click.pass_obj
def score(
    progress: ConsoleProgress,
    /,
    models: tuple[str, ...],
    output: Path | None,
    compare: tuple[Path, Path] | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Lower scores are more redundant,
    whatever the metric. Several MODELs are the checkpoints of one training: --checkpoints.
    """
    from exporter.errors import UsageError

    if bool(models) == (compare is not None):
        raise UsageError("Say what to score: MODEL.", "Or which two files to hold side by side.")
    if compare is not None:
        _refuse_idle(options)
        _compare(*compare, _file(output), as_json)
    elif asks_for_series(options):
        _score_series(progress, models, output or Path("importance"), as_json, options)
    elif len(models) > 1:
        raise UsageError(
            f"{len(models)} models are named.",
            "Score one; or, where they are checkpoints of one training, say --checkpoints.",
        )
    else:
        _score(progress, models[0], _file(output) or Path("importance.json"), as_json, options)


def _file(output: Path | None) -> Path | None:
    """Refuses a folder where a file is to be written, before anything is scored."""
    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a directory.", param_hint="-o")
    return output


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """Refuses what only scoring would heed."""
    from exporter.errors import UsageError

    given = given_options()
    for param in click.get_current_context().command.params:
        if param.name in options and param.name in given:
            raise UsageError(
                f"{param.opts[0]} is for scoring, and --compare scores nothing.", "Leave it away."
            )


def _score_series(
    progress: ConsoleProgress,
    models: tuple[str, ...],
    out: Path,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from exporter.choose.studies.series import STABILITY
    from exporter.cli.score_series import scored_series
    from exporter.cli.study_results import print_stability

    with one_cluster(options, progress):
        report = scored_series(models, out, options, progress)
    print_stability(report, out / STABILITY, as_json=as_json)


def _score(
    progress: ConsoleProgress, model: str, output: Path, as_json: bool, options: dict[str, Any]
) -> None:
    from exporter.cli.results import print_artifact
    from exporter.cli.score_runs import scored
    from exporter.files import refuse_overwriting
    from exporter.report.words import significant
    from graph_passes.files.placing import working

    refuse_overwriting(output, map(Path, filter(None, (model, options["calibration"]))))
    with working(output):
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
    from exporter.score.comparison import compare_files, comparison_rows

    if output is not None:
        refuse_overwriting(output, [first, second])
    comparison = compare_files(first, second)
    if output is not None:
        comparison.write(output)
    if as_json:
        echo_json(comparison.to_json())
    else:
        print_rows(*comparison_rows(comparison))

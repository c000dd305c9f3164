"""`depthcut score`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.artifacts import ImportanceReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo_json
from exporter.cli.results import print_artifact, print_rows
from exporter.cli.score_call import ScoreCall, Series, scored
from exporter.cli.score_series import score_series
from exporter.cli.study_results import print_study
from exporter.errors import UsageError
from exporter.files import refuse_overwriting
from exporter.options import running_command
from exporter.report.words import significant
from graph_passes.files.placing import working


@command(ScoreCall)
def score(call: ScoreCall, progress: ConsoleProgress) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Sublayers with lower
    scores are more redundant, whatever the metric. Give several MODELs with --checkpoints if they
    are checkpoints of one training.
    """
    if call.compare:
        _compare(call, _file(call.output), progress)
    elif call.series != Series():
        score_series(call, call.output or Path("importance"), progress)
    else:
        _score(call, _file(call.output) or Path("importance.json"), progress)


def _file(output: Path | None) -> Path | None:
    """Refuses a folder where a file is to be written, before anything is scored."""
    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a directory.", param_hint="-o")
    return output


def _score(call: ScoreCall, output: Path, progress: ConsoleProgress) -> None:
    model = call.models[0]
    inputs = map(Path, (model, *call.score.calibration))
    refuse_overwriting(output, inputs, "importance_report")
    with working(output):
        report = scored(model, call, progress)
        report.write(output)
    lowest = sorted((s for s in report.scores if s.kind != "block"), key=lambda s: s.score)[:5]
    told = ", ".join(f"{s.kind} {s.layer} ({significant(s.score, 3)})" for s in lowest)
    by = f" by {report.metric}" if report.further else ""
    print_artifact(report, output, progress.as_json, f"Most redundant{by}: {told}")


def _compare(call: ScoreCall, output: Path | None, progress: ConsoleProgress) -> None:
    """Holds two files of one model ranking by ranking, others as a series by one metric.

    Args:
        call: What is asked for.
        output: The file that takes it; None: of a series, ``stability.json``.
        progress: Says whether the result is printed as JSON.

    Raises:
        UsageError: Several metrics are named.
    """
    from exporter.choose.studies.series import STABILITY

    files = [_existing(name) for name in call.models]
    # Cosine, the default, may be asked for as well.
    metrics = call.score.metrics if "--metric" in (running_command.get() or ()) else ()
    if len(metrics) > 1:
        raise UsageError("A series is ranked by one metric.", "Give --metric once.")
    models = {ImportanceReport.read(file).model.sha256 for file in files}
    if len(files) == 2 and len(models) == 1 and not metrics:
        _compare_rankings(files[0], files[1], output, as_json=progress.as_json)
    else:
        metric = metrics[0] if metrics else None
        _compare_series(files, output or Path(STABILITY), metric, as_json=progress.as_json)


def _existing(name: str) -> Path:
    if not Path(name).is_file():
        raise click.BadParameter(f"{name} is not a file.", param_hint="--compare")
    return Path(name)


def _compare_rankings(first: Path, second: Path, output: Path | None, *, as_json: bool) -> None:
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


def _compare_series(files: list[Path], output: Path, metric: str | None, *, as_json: bool) -> None:
    from exporter.choose.studies.stability import stability_of_files
    from exporter.report.files import study_files, write_study

    for path in study_files(output):
        refuse_overwriting(path, files)
    report = stability_of_files(files, metric=metric)
    write_study(report, output)
    print_study(report, output, as_json=as_json)

"""`depthcut score`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_artifact
from exporter.cli.score_call import ScoreCall, scored
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
    scores are more redundant, whatever the metric. With --compare, MODEL... are importance.json
    files: of one model by other metrics or on other texts, or of checkpoints of one training.
    """
    if call.compare:
        _compare(call, _file(call.output), progress)
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
    """Compares score files, and writes that where a file is named for it."""
    from exporter.report.files import study_files, write_study
    from exporter.score.comparison import compare_files

    files = [_existing(name) for name in call.models]
    # Cosine, the default, may be asked for as well.
    metrics = call.score.metrics if "--metric" in (running_command.get() or ()) else ()
    if len(metrics) > 1:
        raise UsageError("One metric can be chosen of files.", "Give --metric once.")
    for path in study_files(output) if output else ():
        refuse_overwriting(path, files)
    comparison = compare_files(files, metrics[0] if metrics else None)
    if output:
        write_study(comparison, output)
    print_study(comparison, output, as_json=progress.as_json)


def _existing(name: str) -> Path:
    if not Path(name).is_file():
        raise click.BadParameter(f"{name} is not a file.", param_hint="--compare")
    return Path(name)

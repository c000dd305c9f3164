"""`depthcut score`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_artifact
from exporter.cli.score_call import ScoreCall, Series, scored
from exporter.cli.score_comparison import compare
from exporter.cli.score_series import score_series
from exporter.files import refuse_overwriting
from exporter.report.words import significant
from graph_passes.files.placing import working


@command(ScoreCall)
def score(call: ScoreCall, progress: ConsoleProgress) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Lower scores are more redundant,
    whatever the metric. Several MODELs are the checkpoints of one training: --checkpoints.
    """
    if call.compare:
        compare(call, _file(call.output), progress)
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
    refuse_overwriting(output, map(Path, filter(None, (model, call.score.calibration))))
    with working(output):
        report = scored(model, call, progress)
        report.write(output)
    lowest = sorted((s for s in report.scores if s.kind != "block"), key=lambda s: s.score)[:5]
    told = ", ".join(f"{s.kind} {s.layer} ({significant(s.score, 3)})" for s in lowest)
    by = f" by {report.metric}" if report.further else ""
    print_artifact(report, output, progress.as_json, f"Most redundant{by}: {told}")

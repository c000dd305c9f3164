"""`depthcut score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import (
    ANY_PATH,
    json_option,
    model_options,
    scoring_options,
    verbosity_options,
)


@click.command(short_help="Measure how redundant each attention, MLP and block is.")
@click.argument("model")
@click.option("-o", "--output", type=ANY_PATH, default=Path("importance.json"), show_default=True)
@scoring_options
@model_options
@json_option
@verbosity_options
@click.pass_obj
def score(
    progress: ConsoleProgress, /, model: str, output: Path, *, as_json: bool, **options: Any
) -> None:
    """Measure how redundant each attention, MLP and block of MODEL is.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Lower scores are more redundant.
    """
    from exporter.cli.requests import score_options, source_options
    from exporter.cli.results import print_artifact
    from exporter.files import refuse_overwriting
    from exporter.importance import score as score_model
    from exporter.model_source import load_model

    refuse_overwriting(output, map(Path, filter(None, (model, options["calibration"]))))
    with progress.task(f"load {model}"):
        loaded = load_model(model, **vars(source_options(options)))
    report = score_model(loaded, **vars(score_options(options)), progress=progress)
    report.write(output)
    lowest = sorted((s for s in report.scores if s.kind != "block"), key=lambda s: s.score)[:5]
    line = "Most redundant: " + ", ".join(f"{s.kind} {s.layer} ({s.score:.4f})" for s in lowest)
    print_artifact(report, output, as_json, line)

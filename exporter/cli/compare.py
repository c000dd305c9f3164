"""`depthcut compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import ANY_PATH, json_option, measuring_options, verbosity_options
from exporter.cli.quality_options import quality_options


@click.command()
@click.argument("baseline", type=ANY_PATH)
@click.argument("candidate", type=ANY_PATH)
@click.option("-o", "--output", type=ANY_PATH, required=True, help="Folder for the report.")
@click.option(
    "--reference", "references", type=ANY_PATH, multiple=True, metavar="ARM",
    help="A further arm, timed in the same rounds; it gets no verdict.",
)  # fmt: skip
@measuring_options
@quality_options
@json_option
@verbosity_options
@click.pass_obj
def compare(
    progress: ConsoleProgress,
    /,
    baseline: Path,
    candidate: Path,
    output: Path,
    *,
    references: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure CANDIDATE against BASELINE: latency, perplexity, agreement, size.

    Both are ONNX files, or folders with a model.onnx. Writes report.json and report.md.
    """
    from exporter.cli.requests import compare_options
    from exporter.cli.results import print_comparison
    from exporter.compare import compare as compare_models
    from exporter.files import write_text
    from exporter.report.markdown import render

    output.mkdir(parents=True, exist_ok=True)  # Fails now, not after the measurement.
    report = compare_models(
        baseline, candidate, compare_options(options), references=references, progress=progress
    )
    report.write(output / "report.json")
    write_text(output / "report.md", render(report))
    print_comparison(report, output, as_json)

"""`depthcut compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import (
    ANY_PATH,
    TextPath,
    json_option,
    measuring_options,
    verbosity_options,
)
from exporter.cli.quality_options import quality_options
from exporter.cli.sections import SectionedCommand
from exporter.cli.timing_options import timing_options

ARM = TextPath(path_type=str)
"""A path, or a kind with a path behind it such as ``torch:DIR``."""


@click.command(cls=SectionedCommand, short_help="Measure two models against each other.")
@click.argument("baseline", type=ARM)
@click.argument("candidate", type=ARM)
@click.option("-o", "--output", type=ANY_PATH, required=True, help="Folder for the report.")
@click.option(
    "--reference", "references", type=ARM, multiple=True, metavar="ARM",
    help="A further arm, of any kind, timed in the same rounds; it gets no verdict.",
)  # fmt: skip
@click.option(
    "--float", "floats", type=ARM, nargs=2, metavar="BASELINE CANDIDATE",
    help="Both models in float, where the arms are their quantised forms: all four are then held "
    "against BASELINE.",
)  # fmt: skip
@click.option(
    "--onnx", type=ANY_PATH, nargs=2, metavar="BASELINE CANDIDATE",
    help="What two engines were built from, where it doesn't lie beside them.",
)  # fmt: skip
@measuring_options
@timing_options
@quality_options
@json_option
@verbosity_options
@click.pass_obj
def compare(
    progress: ConsoleProgress,
    /,
    baseline: str,
    candidate: str,
    output: Path,
    *,
    references: tuple[str, ...],
    floats: tuple[str, str] | None,
    onnx: tuple[Path, Path] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure CANDIDATE against BASELINE: latency, perplexity, agreement, size.

    Both are ONNX files or folders with one, engines or folders of them, or Hugging Face folders
    that PyTorch runs: torch:DIR, torch-compile:DIR; or times that trtexec or polygraphy took:
    times:FILE. Writes report.json, report.md and report.html.
    """
    from exporter.artifacts.ledger import locked
    from exporter.cli.requests import compare_options
    from exporter.cli.results import print_comparison
    from exporter.compare import compare as compare_models
    from exporter.compare.kept import forget
    from exporter.report.files import write_reports

    with locked(output):  # A folder that can't be made fails now, not after the measurement.
        report = compare_models(
            baseline,
            candidate,
            compare_options(options),
            references=references,
            floats=floats,
            onnx=onnx,
            resume=output,
            progress=progress,
        )
        write_reports(report, output)
        forget(output)
    print_comparison(report, output, as_json)

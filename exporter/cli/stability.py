"""`depthcut stability`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.metric_options import METRIC_NAMES
from exporter.cli.options import ANY_FILE, EXISTING_FILE, json_option, verbosity_options


@click.command(short_help="Tell how stable rankings are: over training, or over texts.")
@click.argument("files", type=EXISTING_FILE, nargs=-1, required=True, metavar="FILE FILE...")
@click.option(
    "-o", "--output", type=ANY_FILE, default=Path("stability.json"), show_default=True,
    help="The data; tables and a page with plots stand beside it as .md and .html.",
)  # fmt: skip
@click.option(
    "--metric", type=click.Choice(METRIC_NAMES), metavar="NAME",
    help="Which of the files' metrics counts. [the first file's first]",
)  # fmt: skip
@json_option
@verbosity_options
def stability(
    files: tuple[Path, ...],
    output: Path,
    metric: str | None,
    *,
    as_json: bool,
) -> None:
    """Hold two or more importance.json side by side: how far their rankings agree.

    They are of checkpoints of one training, on one text; or of one model on several texts, or on
    several amounts of one. `depthcut score --checkpoints` and `--vary-calibration` make them.
    """
    from exporter.choose.studies import stability_of_files
    from exporter.cli.study_results import print_stability
    from exporter.files import refuse_overwriting
    from exporter.report.files import study_files, write_stability

    for path in study_files(output):
        refuse_overwriting(path, files)
    report = stability_of_files(files, metric=metric)
    write_stability(report, output)
    print_stability(report, output, as_json=as_json)

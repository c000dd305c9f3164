"""`depthcut plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    drop_options,
    json_option,
    verbosity_options,
)


@click.command(short_help="Choose what to drop: the lowest scores first.")
@click.argument("importance", type=EXISTING_FILE)
@click.option("-o", "--output", type=ANY_PATH, default=Path("plan.json"), show_default=True)
@drop_options
@json_option
@verbosity_options
@click.pass_obj
def plan(
    progress: ConsoleProgress, /, importance: Path, output: Path, *, as_json: bool, **options: Any
) -> None:
    """Choose what to drop from an importance.json: the lowest scores first."""
    from exporter.artifacts import ImportanceReport
    from exporter.cli.requests import drop_request
    from exporter.cli.results import print_artifact
    from exporter.files import refuse_overwriting, sha256_file
    from exporter.planning import plan_drop

    refuse_overwriting(output, [importance])
    counts = {k: v for k, v in vars(drop_request(options)).items() if k != "plan"}
    result = plan_drop(
        ImportanceReport.read(importance),
        **counts,
        importance_sha256=sha256_file(importance),
        progress=progress,
    )
    result.write(output)
    print_artifact(result, output, as_json, "Drop " + result.describe())

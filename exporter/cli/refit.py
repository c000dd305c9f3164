"""`depthcut refit`."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.console import ConsoleProgress, echo
from exporter.cli.options import ANY_PATH, EXISTING_FILE, ONNX_FILE, verbosity_options


@click.command(short_help="Put a graph's weights into an engine.")
@click.argument("engine", type=EXISTING_FILE)
@click.argument("model", type=ONNX_FILE)
@click.option("-o", "--output", type=ANY_PATH, required=True, help="The new engine's file.")
@verbosity_options
@click.pass_obj
def refit(progress: ConsoleProgress, /, engine: Path, model: Path, *, output: Path) -> None:
    """Write ENGINE with the weights of MODEL, an ONNX file or a folder with one.

    ENGINE was built with --refittable or --strip-weights. It takes a GPU.
    """
    from exporter.engines.build.refit import refit_engine

    path, record = refit_engine(engine, model, output, progress=progress)
    echo(f"{record.engine_bytes / 1e6:.1f} MB with the weights of {model}", path)

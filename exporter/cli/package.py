"""`depthcut package`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from exporter.cli.console import echo
from exporter.cli.options import ANY_PATH, EXISTING_PATH, TextPath, verbosity_options
from exporter.cli.sections import Count


@click.command(short_help="Pack a model for serving.")
@click.argument("model", type=EXISTING_PATH)
@click.option("--triton", type=ANY_PATH, metavar="REPOSITORY", help="Into a Triton repository.")
@click.option(
    "--tarball", type=ANY_PATH, metavar="FILE", help="Into one .tar.gz with all that belongs to it."
)
@click.option(
    "--beside", type=TextPath(exists=True, file_okay=False, path_type=Path),
    help="Tarball: the folder with tokenizer, config and plan. [the engine's]",
)  # fmt: skip
@click.option("--name", help="Triton: the model's name. [its folder's]")
@click.option(
    "--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True,
    help="Triton: where it runs.",
)  # fmt: skip
@click.option(
    "--instances", type=Count(), default=1, show_default=True,
    help="Triton: how many.",
)  # fmt: skip
@verbosity_options
def package(
    model: Path,
    *,
    triton: Path | None,
    tarball: Path | None,
    beside: Path | None,
    name: str | None,
    device: Literal["gpu", "cpu"],
    instances: int,
) -> None:
    """Pack MODEL for serving.

    Triton takes an ONNX file, a folder with model.onnx, or an engine of TensorRT; the archive an
    engine with the record beside it, or a folder with an engine for each phase.
    """
    from exporter.engines.build.engine_set import holds_engines_alone
    from exporter.engines.packaging.tarball import package_tarball
    from exporter.engines.packaging.triton import package_triton
    from exporter.errors import UsageError
    from exporter.models.model_folder import find_model

    if triton is None and tarball is None:
        raise UsageError("Say where to:", "--triton REPOSITORY or --tarball FILE, or both.")
    keep = model.is_file() or holds_engines_alone(model)
    source = model if keep else find_model(model).onnx
    if tarball is not None:
        names = package_tarball(source, tarball, beside=beside)
        echo(f"{len(names)} files", tarball)
    if triton is not None:
        folder = package_triton(source, triton, name=name, device=device, instances=instances)
        echo(folder)

"""`depthcut build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.engine_options import (
    backend_option,
    building_options,
    capabilities,
    names,
    shape_options,
)
from exporter.cli.options import ANY_PATH, ONNX_FILE, json_option, verbosity_options
from exporter.cli.sections import Count, SectionedCommand

if TYPE_CHECKING:
    from exporter.engines.build.libraries import Backend
    from exporter.engines.build.settings import Compatibility
    from exporter.engines.build.sidecar import EngineRecord


@click.command(cls=SectionedCommand, short_help="Build an engine from an ONNX file.")
@click.argument("model", type=ONNX_FILE)
@click.option(
    "-o", "--output", type=ANY_PATH, required=True,
    help="The engine's file, or a folder, where it is named after what it is.",
)  # fmt: skip
@click.option(
    "--builds", type=Count(), default=1, show_default=True, metavar="N",
    help="So many of each engine, -b1, -b2 and so on: builds may differ.",
)  # fmt: skip
@backend_option
@shape_options
@building_options
@json_option
@verbosity_options
@click.pass_obj
def build(
    progress: ConsoleProgress,
    /,
    model: Path,
    output: Path,
    *,
    builds: int,
    backend: Backend,
    phases: str | None,
    split: bool,
    batch: str | None,
    prompt: str | None,
    context: str | None,
    dims: tuple[str, ...],
    compute_capabilities: str | None,
    optimization_level: int | None,
    workspace: int | None,
    timing_cache: Path | None,
    hardware_compatibility: Compatibility,
    version_compatible: bool,
    strip_weights: bool,
    refittable: bool,
    detailed: bool,
    tf32: bool,
    as_json: bool,
) -> None:
    """Build an engine from MODEL, an ONNX file or a folder with one, with a record beside it."""
    from exporter.engines.build.build import build_engines
    from exporter.engines.build.profiles import read_ranges
    from exporter.engines.build.settings import BuildSettings

    settings = BuildSettings(
        compute_capabilities=capabilities(compute_capabilities),
        optimization_level=optimization_level,
        workspace_bytes=workspace,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        strip_weights=strip_weights,
        refittable=refittable,
        detailed=detailed,
        tf32=tf32,
    )
    built = build_engines(
        model,
        output,
        phases=names(phases) if phases else None,
        split=split,
        builds=builds,
        ranges=read_ranges(batch=batch, prompt=prompt, context=context, dims=dims),
        backend=backend,
        settings=settings,
        timing_cache=timing_cache,
        progress=progress,
    )
    if as_json:
        echo_json(_json([record for _, record in built], split or builds > 1))
        return
    for path, record in built:
        echo(_line(record), path)


def _json(records: list[EngineRecord], several: bool) -> str:
    """The record; of ``--split`` and ``--builds``, a list of them."""
    dumped = [record.model_dump(mode="json") for record in records]
    return json.dumps(dumped if several else dumped[0], indent=2)


def _line(record: EngineRecord) -> str:
    from exporter.engines.build.driver import ask_driver
    from exporter.engines.build.sidecar import built_for

    phases = " and ".join(entry.phase for entry in record.profiles)
    problem = ask_driver().problem
    return (
        f"{phases}: {record.engine_bytes / 1e6:.1f} MB, {sum(record.layers.values())} layers from "
        f"{record.network_layers}, in {record.total_s:.1f} s, for {built_for(record)}"
        + (f"; built, not run: {problem}" if problem else "")
    )

"""`depthcut check-engine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.engine_options import backend_option
from exporter.cli.options import ONNX_FILE, json_option, verbosity_options

if TYPE_CHECKING:
    from exporter.engines.build.check import EngineCheck
    from exporter.engines.build.libraries import Backend


@click.command("check-engine", short_help="Ask the engine's parser whether it takes an ONNX file.")
@click.argument("model", type=ONNX_FILE)
@backend_option
@json_option
@verbosity_options
@click.pass_obj
def check_engine(
    progress: ConsoleProgress, /, model: Path, *, backend: Backend, as_json: bool
) -> None:
    """Ask the engine's parser whether it takes MODEL, and list what it doesn't.

    MODEL is an ONNX file, or a folder with one.

    Exit code 0 when all of it parses, 1 when not.
    """
    from exporter.engines.build.check import check_engine as check

    found = check(model, backend=backend, progress=progress)
    if as_json:
        echo_json(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    click.get_current_context().exit(1 if found.findings else 0)


def _print(found: EngineCheck) -> None:
    from exporter.cli.results import print_rows

    name = f"{found.backend} {found.version}"
    if not found.findings:
        echo(f"{name} parses the whole graph.")
        return
    rows = [
        ("-" if f.layer is None else str(f.layer), f.operator, f.node, f.reason)
        for f in found.findings
    ]
    count = len(found.findings)
    print_rows(("layer", "operator", "node", "reason"), rows)
    echo(f"{name} does not take {count} node{'s' * (count > 1)}.")
    for way_out in dict.fromkeys(f.way_out for f in found.findings if f.way_out):
        echo(f"way out: {way_out}")

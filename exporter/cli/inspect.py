"""`depthcut inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.console import echo, echo_json
from exporter.cli.options import ONNX_FILE, json_option, verbosity_options

if TYPE_CHECKING:
    from graph_passes.types import Refusal, ResidualSite


@click.command(short_help="List what could be cut out of an ONNX file.")
@click.argument("model", type=ONNX_FILE)
@json_option
@verbosity_options
def inspect(model: Path, *, as_json: bool) -> None:
    """List the residual sites of MODEL: what could be cut, and what not, and why.

    MODEL is an ONNX file, or a folder with one.
    """
    from exporter.cut.surgery import inspect_file
    from graph_passes.types import Refusal, ResidualSite

    found = inspect_file(model)
    sites = [item for item in found if isinstance(item, ResidualSite)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    if as_json:
        listing = {"sites": list(map(asdict, sites)), "refusals": list(map(asdict, refusals))}
        echo_json(json.dumps(listing, indent=2))
        return
    _print_sites(sites)
    _print_refusals(refusals)


def _print_sites(sites: list[ResidualSite]) -> None:
    from exporter.cli.results import print_rows

    rows = [
        (str(s.layer), s.kind, f"{s.parameters:,}", s.residual_add, ", ".join(s.kv_inputs) or "-")
        for s in sites
    ]
    print_rows(("layer", "kind", "parameters", "residual add", "KV inputs"), rows)
    echo(f"{len(sites)} sites can be cut.")


def _print_refusals(refusals: list[Refusal]) -> None:
    for refusal in refusals:
        layer = "" if refusal.layer is None else f" {refusal.layer}"
        echo(f"refused: {refusal.kind or 'graph'}{layer} at {refusal.node}: {refusal.reason}")

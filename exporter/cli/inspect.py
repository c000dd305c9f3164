"""`depthcut inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.option_types import OnnxFile
from exporter.options import Options, argument, dataclass
from graph_passes.types import Refusal, ResidualSite


@dataclass(frozen=True)
class InspectCall(Options):
    """What `depthcut inspect` is asked to do."""

    model: OnnxFile = argument("MODEL")


@command(InspectCall)
def inspect(call: InspectCall, progress: ConsoleProgress) -> None:
    """List the sublayers of MODEL: what can be cut, what can't, and why.

    MODEL is an ONNX file, or a folder with one.
    """
    from exporter.cut.surgery import inspect_file

    found = inspect_file(call.model)
    sites = [item for item in found if isinstance(item, ResidualSite)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    if progress.as_json:
        listing = {"sites": list(map(asdict, sites)), "refusals": list(map(asdict, refusals))}
        echo_json(json.dumps(listing, indent=2))
        return
    _print_sites(sites)
    _print_refusals(refusals)


def _print_sites(sites: list[ResidualSite]) -> None:
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

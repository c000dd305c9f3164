"""`depthcut inspect`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporter.artifacts.servers import SERVERS, ServingRow, serving_rows
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows, print_serving
from exporter.option_types import OnnxFile
from exporter.options import Options, argument, dataclass
from graph_passes.types import Refusal, ResidualSite

_OTHERS = [name for name, held in SERVERS.items() if held.form != "ONNX"]
_NO_GRAPHS = (
    f"{', '.join(_OTHERS[:-1])} and {_OTHERS[-1]} read no ONNX files: cut the model's Hugging Face "
    "folder or GGUF file for them."
)


@dataclass(frozen=True)
class InspectCall(Options):
    """What `depthcut inspect` is asked to do."""

    model: OnnxFile = argument("MODEL")


@command(InspectCall)
def inspect(call: InspectCall, progress: ConsoleProgress) -> None:
    """List the sublayers of MODEL: what can be cut, what can't, and why.

    MODEL is an ONNX file, a folder with one, or a GGUF file. A table tells which runtimes can hold
    such cuts of it.
    """
    from exporter.models.gguf_model_files import GGUF_SUFFIX

    of_gguf = call.model.suffix == GGUF_SUFFIX
    listing, runtimes = _of_gguf(call.model) if of_gguf else _of_graph(call.model)
    if progress.as_json:
        told = {**listing, "runtimes": list(map(asdict, runtimes))}
        echo_json(json.dumps(told, indent=2, default=asdict))
        return
    if of_gguf:
        _print_sublayers(listing["sublayers"])
    else:
        _print_sites(listing["sites"])
        _print_refusals(listing["refusals"])
    if runtimes:
        print_serving(runtimes)
    if runtimes and not of_gguf:
        echo(_NO_GRAPHS)


def _of_graph(model: Path) -> tuple[dict[str, list[Any]], list[ServingRow]]:
    from exporter.cut.surgery import inspect_file

    found = inspect_file(model)
    sites = [item for item in found if isinstance(item, ResidualSite)]
    listing: dict[str, list[Any]] = {
        "sites": sites,
        "refusals": [item for item in found if isinstance(item, Refusal)],
    }
    reading_graphs = [row for row in serving_rows() if row.form == "ONNX"]
    return listing, reading_graphs if sites else []


def _of_gguf(model: Path) -> tuple[dict[str, list[Any]], list[ServingRow]]:
    from exporter.cut.gguf_deci import ALIKE
    from exporter.cut.gguf_layers import sublayers_of
    from exporter.models.gguf_model_files import read_model

    file = read_model(model)
    sublayers = [
        {
            "layer": ref.layer,
            "kind": ref.kind,
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors),
        }
        for ref, tensors in sublayers_of(file).items()
    ]
    other = "" if file.architecture in ALIKE else f"its architecture is {file.architecture}"
    return {"sublayers": sublayers}, serving_rows(other)


def _print_sublayers(found: Sequence[dict[str, Any]]) -> None:
    rows = [
        (str(each["layer"]), each["kind"], f"{each['parameters']:,}", f"{each['bytes']:,}")
        for each in found
    ]
    print_rows(("layer", "kind", "parameters", "bytes"), rows)


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

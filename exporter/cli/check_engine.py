"""`depthcut check-engine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.engines.build.libraries import usual_backend
from exporter.engines.build.settings import EngineOption
from exporter.option_types import OnnxFile
from exporter.options import Options, argument, dataclass, part

if TYPE_CHECKING:
    from exporter.engines.build.check import EngineCheck


@dataclass(frozen=True, kw_only=True)
class CheckEngineCall(Options):
    """What `depthcut check-engine` is asked to do."""

    model: OnnxFile = argument("MODEL")
    library: EngineOption = part(EngineOption())


@command(CheckEngineCall, name="check-engine")
def check_engine(call: CheckEngineCall, progress: ConsoleProgress) -> int:
    """Check whether the engine's parser accepts MODEL, and list what it rejects.

    MODEL is an ONNX file, or a folder with one.

    Exit code 0 if the whole graph parses, otherwise 1.
    """
    from exporter.engines.build.check import check_engine as check

    backend = usual_backend(call.library.engine)
    found = check(call.model, backend=backend, progress=progress)
    if progress.as_json:
        echo_json(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    return 1 if found.findings else 0


def _print(found: EngineCheck) -> None:
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
    echo(f"{name} rejects {count} node{'s' * (count > 1)}.")
    for way_out in dict.fromkeys(f.way_out for f in found.findings if f.way_out):
        echo(f"way out: {way_out}")

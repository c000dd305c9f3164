"""`depthcut doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.engines.doctor import Place, diagnose, health
from exporter.options import Options, dataclass, option


@dataclass(frozen=True)
class DoctorCall(Options):
    """What `depthcut doctor` is asked to do."""

    health: Place | None = option(
        None,
        "Only check whether models can run on a CPU or a GPU here, without running anything there.",
    )


@command(DoctorCall)
def doctor(call: DoctorCall, progress: ConsoleProgress) -> int:
    """Show what this machine can do, and which extra adds what is missing.

    Exit code 0 when ONNX files can be pruned, verified and compared here, else 1; with --health,
    0 when models can run there.
    """
    found = health(call.health) if call.health else diagnose()
    if progress.as_json:
        echo_json(json.dumps(asdict(found), indent=2))
        return 0 if found.fit else 1
    rows = [
        (component.name, component.found or "missing", component.serves)
        for component in found.components
    ]
    print_rows(("component", "found", "for"), rows)
    remedies = [f"{p.name.strip()}: {p.remedy}" for p in found.components if p.remedy]
    if remedies:
        echo()
        echo("To add what is missing (in a clone, write '.[cpu]' instead of 'depthcut[cpu]'):")
        echo(*remedies)
    return 0 if found.fit else 1

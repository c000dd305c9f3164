"""`depthcut doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from exporter.cli.console import echo, echo_json
from exporter.cli.options import json_option


@click.command(short_help="Tell what this machine can do.")
@json_option
def doctor(*, as_json: bool) -> None:
    """Tell what this machine can do, and which extra brings what is missing.

    Exit code 0 when ONNX files can be pruned, verified and compared here.
    """
    from exporter.cli.results import print_rows
    from exporter.engines.doctor import diagnose

    found = diagnose()
    if as_json:
        echo_json(json.dumps(asdict(found), indent=2))
    else:
        print_rows(
            ("component", "found", "for"),
            [(p.name, p.found or "missing", p.serves) for p in found.components],
        )
        remedies = [f"{p.name.strip()}: {p.remedy}" for p in found.components if p.remedy]
        if remedies:
            echo()
            echo("To do, where it is needed; in a clone '.[cpu]' stands for 'depthcut[cpu]':")
            echo(*remedies)
    click.get_current_context().exit(0 if found.fit else 1)

"""The command `depthcut`."""

from __future__ import annotations

import sys

from depthcut_packages import hidden_by


def main() -> None:
    """Runs it, if what Python would import for it is depthcut's."""
    problem = hidden_by()
    if problem is not None:
        sys.stderr.write(f"depthcut: {ascii(problem)[1:-1]}\n")
        sys.exit(2)
    from exporter.cli import main as run

    run()

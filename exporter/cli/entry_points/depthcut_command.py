"""The command `depthcut`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs it, if what Python would import for it is depthcut's.

    Nothing is imported before: Ctrl-C ends it with one line as soon as Python runs it.
    """
    try:
        _run()
    except KeyboardInterrupt:
        sys.stderr.write("depthcut: Interrupted. No result is half-written.\n")
        sys.exit(130)


def _run() -> None:
    from depthcut_packages import hidden_by

    problem = hidden_by()
    if problem is not None:
        sys.stderr.write(f"depthcut: {ascii(problem)[1:-1]}\n")
        sys.exit(2)
    from exporter.cli import main as run

    run()

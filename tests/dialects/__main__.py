"""Runs every dialect that this environment can write: ``python -m tests.dialects``.

``--write PAGE`` puts the rows into the page, in the place of earlier ones; rows of tools that are
not installed here stay. Names, or parts of them, choose dialects. A dialect that fails fails the
run, and its earlier row goes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from exporter.files import write_text
from tests.dialects.checks import check
from tests.dialects.makers import Workshop
from tests.dialects.registry import DIALECTS, Dialect
from tests.dialects.table import read_rows, render, row


def main(arguments: list[str]) -> int:
    """Runs the chosen dialects."""
    parser = argparse.ArgumentParser(prog="python -m tests.dialects", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the dialects' names")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page to update")
    options = parser.parse_args(arguments)
    page = options.write.read_text() if options.write and options.write.exists() else ""
    rows, failed = read_rows(page), False
    with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
        shop = Workshop(Path(folder))
        for dialect in _chosen(options.names):
            made = _row(dialect, shop)
            failed = failed or made is None
            rows[dialect.name] = made or ""
    if options.write:
        write_text(options.write, render(rows, DIALECTS))
    return int(failed)


def _chosen(names: list[str]) -> list[Dialect]:
    wanted = [d for d in DIALECTS if not names or any(name in d.name for name in names)]
    for dialect in wanted:
        if dialect.missing:
            print(f"left out, {dialect.missing} is not installed: {dialect.name}")
    return [dialect for dialect in wanted if not dialect.missing]


def _row(dialect: Dialect, shop: Workshop) -> str | None:
    start = time.monotonic()
    try:
        line = row(dialect, check(dialect, shop))
    except Exception as error:  # a tool's or a graph's own failure; the others still run
        print(f"FAILED {dialect.name}: {type(error).__name__}: {error}", flush=True)
        return None
    print(f"{time.monotonic() - start:5.1f} s  {line}", flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

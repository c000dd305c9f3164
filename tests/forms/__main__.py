"""Tries the fusers: ``python -m tests.forms [NAME ...] [--write PAGE]``."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from exporter.files import write_text
from tests.forms.table import SUBJECTS, read_lines, render, rows


def main(arguments: list[str]) -> int:
    """Runs the chosen architectures; a page's rows of others stay."""
    parser = argparse.ArgumentParser(prog="python -m tests.forms", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page to update")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    chosen = [s for s in SUBJECTS if not options.names or s.name in options.names]
    page = options.write.read_text() if options.write and options.write.exists() else ""
    lines = read_lines(page) | {subject.name: [] for subject in chosen}
    with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
        for row in rows(chosen, Path(folder)):
            print(row.line(), flush=True)
            lines[row.subject].append(row.line())
            if options.write:
                write_text(options.write, render(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line: checks architectures, prints a line for each, and writes the table.

Finished rows are kept under ``out/`` and taken over by the next run as long as the code, the
libraries and the number of random sets are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tests.architectures.catalogue import CATALOGUE, Architecture
from tests.architectures.table import TOLERANCE, Row, table
from tests.benchmarks.frame import KeptRows

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "out" / "architectures"
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
RANDOM_SETS = 12  # over a thousand in all


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when everything holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--random", type=int, default=RANDOM_SETS, help="random sets for each")
    parser.add_argument("--write", type=Path, help="the Markdown file; needs all architectures")
    parser.add_argument("--fresh", action="store_true", help="take over no finished row")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {architecture.name for architecture in CATALOGUE}
    if unknown or (options.names and options.write):
        parser.error(f"unknown: {sorted(unknown)}" if unknown else "--write needs all of them")
    rows = []
    for row in run(options.names, options.random, fresh=options.fresh):
        print(_line(row), flush=True)
        rows.append(row)
    if options.write:
        from exporter.files import write_text

        page = table(rows, versions(), options.random, TOLERANCE, summary(rows))
        write_text(options.write, page)
    print(summary(rows))
    return 0 if all(row.holds for row in rows) else 1


def run(names: Sequence[str], random_sets: int, *, fresh: bool = False) -> Iterator[Row]:
    """The rows of the named architectures, or of all, one after the other."""
    kept = KeptRows(KEPT, [random_sets, versions(), _sources()])
    for architecture in CATALOGUE:
        if names and architecture.name not in names:
            continue
        saved = None if fresh else kept.find(repr(architecture))
        row = None if saved is None else Row(**saved)
        if row is None or not row.holds:
            row = _check(architecture, random_sets)
            kept.keep(repr(architecture), asdict(row))
        yield row


def summary(rows: Sequence[Row]) -> str:
    """One line over all rows."""
    whole = [row for row in rows if row.holds and row.cuts]
    worst = max((row.worst_error for row in whole), default=0.0)
    wrong = sum(len(row.wrong) for row in rows)
    return (
        f"{len(whole)} of {len(rows)} hold whole; {sum(row.cuts for row in rows)} cut models, "
        f"{sum(row.random_sets for row in rows)} of them random sets, {wrong} wrong; "
        f"worst relative error {worst:.1e}"
    )


def versions() -> dict[str, str]:
    """The libraries that matter."""
    return {name: version(name) for name in LIBRARIES}


def _check(architecture: Architecture, random_sets: int) -> Row:
    from tests.architectures.check import check
    from tests.architectures.exports import quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        return check(architecture, Path(folder), random_sets)


def _line(row: Row) -> str:
    verdict = "holds" if row.holds else "WRONG"
    text = f"{row.cuts:3} cuts, worst {row.worst_error:.1e}" if row.cuts else row.note
    reasons = " ".join([row.failed, *row.wrong[:3]]).strip()
    return f"{row.name:30} {verdict} {row.seconds:6.1f} s  {text}  {reasons}".rstrip()


def _sources() -> str:
    """Of the code that a row depends on."""
    digest = hashlib.sha256()
    apart = {"catalogue.py", "command.py"}
    sources = [*ROOT.glob("graph_passes/**/*.py"), *Path(__file__).parent.glob("[!t_]*.py")]
    for source in sorted(source for source in sources if source.name not in apart):
        digest.update(source.read_bytes())
    return digest.hexdigest()

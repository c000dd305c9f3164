"""Builds the engines of the table: ``python -m tests.benchmarks.bench_engines [NAME ...]``.

Names are such as ``smollm2-float16-20``, or their beginnings; all by default. ``--write PAGE``
writes the table, of all of them. No GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from exporter.engines.build.build import build_engines
from exporter.engines.build.settings import BuildSettings
from tests.benchmarks.engine_subjects import SUBJECTS, Subject, make_graphs
from tests.benchmarks.engine_table import BuildRow, render

LIBRARIES = ("tensorrt-rtx", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_SM89 = BuildSettings(compute_capabilities=("sm89",))


def main(arguments: Sequence[str]) -> int:
    """Builds what is named and prints a line for each engine."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks engines", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the table; all by default")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page to write")
    options = parser.parse_args(arguments)
    wanted = [each for each in SUBJECTS if each.key.startswith(tuple(options.names or [""]))]
    if not wanted or (options.write and options.names):
        parser.error("--write needs all of them" if wanted else f"no {', '.join(options.names)}")
    rows = []
    for subject in wanted:
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            for row in build_rows(subject, Path(folder)):
                print(f"{subject.key}: {row}", flush=True)
                rows.append(row)
    if options.write:
        from exporter.engines.environment import processor_name
        from exporter.files import write_text

        write_text(options.write, render(rows, versions(), processor_name()))
    return 0


def versions() -> dict[str, str]:
    """Of the libraries that decide what an engine becomes."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def build_rows(subject: Subject, folder: Path) -> Iterator[BuildRow]:
    """The rows of a subject: as it is, and cut."""
    for graph, cut in zip(make_graphs(subject, folder), (0, len(subject.cut)), strict=True):
        ((_, record),) = build_engines(
            graph, folder / "engines", phases=subject.phases, ranges=subject.ranges, settings=_SM89
        )
        onnx_bytes = sum(f.stat().st_size for f in graph.parent.iterdir() if ".onnx" in f.name)
        yield BuildRow(
            model=subject.name,
            dtype=subject.dtype,
            opset=subject.opset,
            cut=cut,
            onnx_mb=round(onnx_bytes / 1e6, 1),
            engine_mb=round(record.engine_bytes / 1e6, 1),
            network_layers=record.network_layers,
            real_layers=sum(record.layers.values()),
            builder_s=round(record.parse_s + record.build_s, 1),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

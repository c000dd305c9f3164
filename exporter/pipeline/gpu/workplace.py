"""What a step is given: where it works, what it has finished already, and what it measures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from exporter.artifacts import (
    GpuCard,
    GpuCheck,
    GpuLargest,
    GpuTests,
    GpuTime,
    library_versions,
)
from exporter.artifacts.store import Store
from exporter.engines.build.build import build_engines
from exporter.engines.build.driver import ask_driver
from exporter.engines.build.libraries import Backend
from exporter.engines.build.profiles import Ranges
from exporter.engines.build.settings import BuildSettings
from exporter.engines.build.sidecar import EngineRecord, sidecar_path
from exporter.files import sha256_file
from exporter.pipeline.gpu.cases import CARD, REHEARSAL, Case
from exporter.pipeline.gpu.llama_shaped import LlamaShape, write_llama
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import remove_tree

_R = TypeVar("_R", GpuCheck, GpuTime, GpuLargest)


@dataclass(frozen=True)
class Order:
    """What a session's steps are told, as it passes to their processes.

    Attributes:
        engine: The library that is measured.
        tests: The folder of the tests that need a GPU; None: there are none.
        stand_in: For a rehearsal, the module whose ``install`` puts something in the place of the
            driver, of CUDA and of the libraries. None on a card.
    """

    engine: Backend
    tests: str | None = None
    stand_in: str | None = None

    @property
    def case(self) -> Case:
        """What is measured."""
        return CARD if self.stand_in is None else REHEARSAL

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def conditions(self) -> list[Any]:
        """What every measurement depends on: how it is made, the card, the libraries."""
        driver = ask_driver()
        cards = [vars(device) for device in driver.devices]
        return [self.engine, self.stand_in, cards, driver.cuda_version, library_versions()]


@dataclass
class Found:
    """What a step has found so far; its fields are those of :class:`exporter.artifacts.GpuStep`."""

    card: GpuCard | None = None
    tests: GpuTests | None = None
    checks: list[GpuCheck] = field(default_factory=list)
    times: list[GpuTime] = field(default_factory=list)
    largest: list[GpuLargest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, rows: Sequence[GpuCheck] | Sequence[GpuTime] | Sequence[GpuLargest]) -> None:
        """Takes rows in."""
        for row in rows:
            match row:
                case GpuCheck():
                    self.checks.append(row)
                case GpuTime():
                    self.times.append(row)
                case GpuLargest():
                    self.largest.append(row)


@dataclass(frozen=True)
class Workplace:
    """One step's.

    Attributes:
        folder: For models and engines; it goes when the step has ended.
        order: What the session was asked for.
        progress: Hears what goes on.
        found: What the step has found so far.
    """

    folder: Path
    order: Order
    progress: Progress = QUIET
    found: Found = field(default_factory=Found)

    @property
    def case(self) -> Case:
        """What is measured."""
        return self.order.case

    @cached_property
    def _store(self) -> Store:
        return Store(self.folder.with_suffix(".jsonl"), self.order.conditions())

    def rows(self, name: str, kind: type[_R], make: Callable[[], list[_R]]) -> list[_R]:
        """What an interrupted run of the step has measured under a name, or what is measured now.

        Args:
            name: Of the measurement.
            kind: Of its rows.
            make: Measures.
        """
        with self.progress.task(name):
            rows: list[_R] = self._store.once(name, TypeAdapter(list[kind]), make)  # type: ignore[valid-type]
        self.found.take(rows)
        return rows

    def kept(self, name: str, make: Callable[[], int]) -> int:
        """The same of a number other than 0 that is no result."""
        return self._store.once(name, TypeAdapter(int), make)

    def model(self, name: str, shape: LlamaShape, *, in_place: bool = True) -> Path:
        """A model with random weights, in a folder of its own."""
        path = self.folder / name / "model.onnx"
        mark = path.with_name("whole")
        if not mark.is_file():
            remove_tree(path.parent)
            room = self.case.room if in_place else None
            with self.progress.task(f"write {name}"):
                write_llama(path, shape, noise=shape.hidden**-0.5, room=room)
            mark.touch()
        return path

    def engines(
        self,
        onnx: Path,
        name: str,
        phases: Sequence[str],
        ranges: Ranges,
        *,
        backend: Backend | None = None,
        **settings: Any,
    ) -> Path:
        """Engines of a model, one for each phase, in a folder of their own.

        Args:
            onnx: The graph.
            name: The folder's.
            phases: Which of ``prefill`` and ``decode``.
            ranges: What they serve.
            backend: The library; None for the session's.
            settings: Those of :class:`BuildSettings`.
        """
        folder = self.folder / name
        made_from = [backend or self.order.engine, self.order.conditions()]
        asked = [sha256_file(onnx), list(phases), str(ranges), settings]
        wanted = json.dumps([*made_from, *asked], default=str)
        mark = folder / "built"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
            remove_tree(folder)
            folder.mkdir(parents=True)
            build_engines(
                onnx,
                folder / "m.engine",
                phases=phases,
                split=True,
                ranges=ranges,
                backend=backend or self.order.engine,
                settings=BuildSettings(**settings),
                progress=self.progress,
            )
            mark.write_text(wanted, encoding="utf-8")
        return folder

    def drop(self, *names: str) -> None:
        """Removes models or engines that are measured; engines of this size fill a disk."""
        for name in names:
            remove_tree(self.folder / name)

    def free_disk_bytes(self) -> int:
        """What is left where it works."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free


def record_of(folder: Path, phase: str = "decode") -> EngineRecord:
    """The record of the engine for a phase."""
    records = (EngineRecord.read(sidecar_path(path)) for path in sorted(folder.glob("*.engine")))
    return next(each for each in records if any(p.phase == phase for p in each.profiles))

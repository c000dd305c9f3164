"""What a step builds, keeps and refuses, on the stand-in of a card and of the builder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.engines.build.libraries import Backend
from exporter.engines.build.profiles import Ranges, Span
from exporter.errors import EngineError
from exporter.pipeline.gpu import workplace
from exporter.pipeline.gpu.attention import time_attention
from exporter.pipeline.gpu.cases import TINY
from exporter.pipeline.gpu.models import time_large_model
from exporter.pipeline.gpu.workplace import Order, Workplace, record_of
from graph_passes.files.locking import FOLDER
from tests.raising import raises
from tests.stand_in.installed import stand_in
from tests.stand_in.rehearsal import MEMORY_BYTES, build_engines


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A card; hears the phases of each build."""
    builds: list[Any] = []

    def build(*arguments: Any, **how: Any) -> None:
        builds.append(how["phases"])
        build_engines(*arguments, **how)

    monkeypatch.setattr(workplace, "build_engines", build)
    with stand_in(memory_bytes=MEMORY_BYTES):
        yield builds


def place(folder: Path, engine: Backend = "tensorrt-rtx") -> Workplace:
    return Workplace(folder / FOLDER / "gpu/a", Order(engine, stand_in="none"))


def test_engines_of_another_library_are_built_anew(tmp_path: Path, built: list[Any]) -> None:
    ranges = Ranges(batch=Span(1, 1, 1), prompt=Span(8, 8, 8))
    libraries: tuple[Backend, ...] = ("tensorrt-rtx", "tensorrt-rtx", "tensorrt")
    for library, builds in zip(libraries, (1, 1, 2), strict=True):
        there = place(tmp_path, library)
        engines = there.engines(there.model("m", TINY), "e", ("decode",), ranges)
        assert record_of(engines).backend == library
        assert len(built) == builds


def test_a_builder_without_memory_is_told_from_a_batch_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **how: Any) -> None:
        if tuple(how["phases"]) == ("decode",):
            raise EngineError("No memory to build with.", code="out-of-memory")
        build_engines(*arguments, **how)

    monkeypatch.setattr(workplace, "build_engines", build)
    with raises(EngineError, "out-of-memory"):
        time_large_model(place(tmp_path), "Llama-3-8B")


def test_another_form_than_was_asked_for_is_told_once_in_each_run(tmp_path: Path) -> None:
    notes, times = [], []
    for _ in range(2):
        there = place(tmp_path)
        time_attention(there)
        notes.append([note.partition(":")[0] for note in there.found.notes])
        times.append(there.found.times)
    assert notes == [["mask"], ["mask"]]  # the stand-in's engines are told by lengths alone
    assert times[0] == times[1]

"""Tiny decoders as engines of the stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import Phase
from graph_passes import save_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from tests.graph_passes.decoder_graphs import decoder_model
from tests.stand_in.engine_files import write_engine

ROOM = 32
RANGES = Ranges(batch=Span(1, 2, 3), prompt=Span(1, 4, 16), context=Span(1, 4, ROOM - 1))


def decoder_onnx(folder: Path, *, in_place: bool) -> Path:
    """A decoder of two layers, its caches growing or in place."""
    model = decoder_model()
    if in_place:
        CacheInPlacePass(ROOM)(model)
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def decoder_engine(
    folder: Path,
    *,
    in_place: bool = True,
    phases: Sequence[Phase] = ("prefill", "decode"),
    **facts: Any,
) -> Path:
    """Its engine, with a profile for each phase; see :func:`write_engine`."""
    onnx = decoder_onnx(folder, in_place=in_place)
    return write_engine(onnx, folder / "model.engine", phases, RANGES, **facts)


def split_engines(folder: Path, **facts: Any) -> Path:
    """A folder with an engine for each phase, on caches in place."""
    onnx = decoder_onnx(folder, in_place=True)
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        write_engine(onnx, folder / f"model-{phase}.engine", [phase], RANGES, **facts)
    return folder


class Scripted:
    """A decoder that says what it is told, whatever it reads."""

    backend = "scripted"

    def __init__(self, *texts: Sequence[int]) -> None:
        self.texts, self.at, self.batches = np.array(texts), 0, []  # type: ignore[var-annotated]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        pass

    def prefill(self, token_ids: Any, *, context: int | None = None) -> Any:
        self.at, self.first = 0, int(token_ids[0, 0])
        self.batches.append(len(token_ids))
        return self.step(token_ids)

    def step(self, token_ids: Any) -> Any:
        rows = self.texts[self.first : self.first + len(token_ids), self.at]
        self.at += 1
        return np.eye(10, dtype=np.float32)[rows]

"""A part of a row's measurement, between two loadings of the arms."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.store import Store
from exporter.compare.timing.probe import Cell


@dataclass(frozen=True)
class Chunk:
    """Rounds that were taken in one go.

    Attributes:
        times_ms: ``[rounds, arms, 2 * calls, phases]``.
        seconds: What taking them took.
        settled: Whether the warm-up before them had settled.
        clock: Whose.
        planned: In how many chunks the row was to be measured.
        reloaded: Whether each of them has a loading of its own.
        dropped: Rounds that were thrown away.
    """

    times_ms: NDArray[np.float64]
    seconds: float
    settled: bool
    clock: Literal["host", "device"]
    planned: int
    reloaded: bool
    dropped: int = 0

    @property
    def calls(self) -> int:
        """Timed calls of one turn."""
        return int(self.times_ms.shape[2]) // 2

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "times_ms": self.times_ms.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Chunk:
        """From plain data.

        Raises:
            ValueError: It isn't what :meth:`to_json` gives.
        """
        try:
            times = np.array(data["times_ms"], np.float64)
            found = cls(**{**data, "times_ms": times})
        except (TypeError, KeyError) as error:
            raise ValueError("this is no chunk") from error
        if times.ndim != 4 or not times.size or not np.isfinite(times).all() or (times <= 0).any():
            raise ValueError("these are no times")
        return found


def find_chunk(store: Store, cell: Cell, number: int) -> Chunk | None:
    """The chunk of a cell, where an earlier run has finished it."""
    kept = store.find(f"{cell} #{number}")
    with contextlib.suppress(ValueError):
        return None if kept is None else Chunk.from_json(kept)
    return None


def keep_chunk(store: Store, cell: Cell, number: int, chunk: Chunk) -> None:
    """Keeps a finished chunk for a later run."""
    store.keep(f"{cell} #{number}", chunk.to_json())

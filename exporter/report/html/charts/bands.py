"""Layers side by side in rows that fit a phone's width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from exporter.artifacts import PlannedDeletion

_MOST = 20
LEFT = 46
"""Units to the left of the first layer, for the names of the lines."""


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its row, the left edge of its column, the column's width."""

    layer: int
    band: int
    x: float
    width: float


def bands(layers: int, *, most: int = _MOST) -> int:
    """How many rows so many layers take."""
    return -(-layers // most)


def places(layers: int, width: float, *, most: int = _MOST) -> Iterator[Place]:
    """Every layer's place, in rows of one length."""
    in_row = -(-layers // bands(layers, most=most))
    step = min(width / in_row, 22)
    for layer in range(layers):
        yield Place(layer, layer // in_row, LEFT + step * (layer % in_row), step)


def deletions_by_cell(plan: Iterable[PlannedDeletion]) -> dict[tuple[int, str], str]:
    """What takes each dropped sublayer's place; a block is all of its layer's sublayers."""
    found: dict[tuple[int, str], str] = {}
    for deletion in plan:
        kinds = ("attention", "mlp", "block") if deletion.kind == "block" else (deletion.kind,)
        for kind in kinds:
            found[deletion.layer, kind] = deletion.replacement
    return found

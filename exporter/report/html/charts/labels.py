"""Names beside the marks of a plot, none on another or on a mark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_RINGS = (10.0, 15.0, 21.0, 28.0, 36.0, 45.0)
"""How far a name may stand from its mark; the first that is free is taken."""
_ANGLES = (45, 135, 0, -45, 180, 90, -135, -90)
_HALF_HEIGHT = 5.5
_LETTER = 7.5
_MARK = 5.5
_NEAR = 15.0
"""A name further away needs a line to its mark."""


@dataclass(frozen=True)
class Box:
    """What is taken: from left to right, from top to bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share anything."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        """Whether all of the other is inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


@dataclass(frozen=True)
class Named:
    """A mark's middle, and what it is called; marks without a name are in the way all the same."""

    x: float
    y: float
    name: str


@dataclass(frozen=True)
class Label:
    """A name's middle, and whether it is so far from its mark that a line is to join them."""

    mark: Named
    x: float
    y: float
    far: bool


def place_labels(
    marks: Sequence[Named], taken: Iterable[Box], crossed: Sequence[Box], inside: Box
) -> list[Label]:
    """Finds a place for every name, near its mark.

    Args:
        marks: All marks, named or not.
        taken: What else names must not stand on.
        crossed: What they had better not stand on, such as intervals.
        inside: The plot.

    Returns:
        A label for each mark with a name; where nothing is free, in the usual place.
    """
    boxes = [*taken, *(_around(mark.x, mark.y, _MARK, _MARK) for mark in marks)]
    labels = []
    for mark in filter(lambda mark: mark.name, marks):
        half = _LETTER * len(mark.name) / 2
        tried = [(x, y, _around(x, y, half, _HALF_HEIGHT)) for x, y in _places(mark, half)]
        free = [t for t in tried if inside.holds(t[2]) and not any(map(t[2].meets, boxes))]
        clear = (t for t in free if not any(map(t[2].meets, crossed)))
        x, y, box = next(clear, (free or tried)[0])
        boxes.append(box)
        far = math.hypot(x - mark.x, y - mark.y) - half > _NEAR
        labels.append(Label(mark, x, y, far))
    return labels


def _places(mark: Named, half: float) -> Iterator[tuple[float, float]]:
    """Middles of a name around its mark, the nearest first."""
    wider = half - _LETTER / 2
    for radius, angle in itertools.product(_RINGS, _ANGLES):
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        yield mark.x + (radius + wider) * across, mark.y - radius * up


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return Box(x - half_width, y - half_height, x + half_width, y + half_height)

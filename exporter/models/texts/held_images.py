"""Images held in few bytes, which become what a model reads a batch at a time.

A byte a colour of each pixel is a quarter of what a model reads, and tells it exactly: what comes
behind an image processor's resizing goes by each of the 256 levels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]


class HeldImage(Protocol):
    """One image."""

    def pixels(self) -> Pixels:
        """What the model reads of it, ``[colours, height, width]``; the same each time."""
        ...


@dataclass(frozen=True, eq=False)
class Levels:
    """An image of 8 bits a colour, as it was resized.

    Attributes:
        levels: ``[colours, height, width]``, uint8.
        numbers: ``[colours, 256]``, what the model reads of each level; one for all images.
    """

    levels: NDArray[np.uint8]
    numbers: Pixels

    def pixels(self) -> Pixels:
        """See :class:`HeldImage`."""
        return np.stack(list(map(np.take, self.numbers, self.levels)))


@dataclass(frozen=True, eq=False)
class Noise:
    """Normal noise, as a generator makes it.

    Attributes:
        state: The generator's before it makes this image.
        shape: ``[colours, height, width]``.
    """

    state: Mapping[str, Any]
    shape: tuple[int, ...]

    def pixels(self) -> Pixels:
        """See :class:`HeldImage`."""
        generator = np.random.default_rng()
        generator.bit_generator.state = self.state
        return generator.standard_normal(self.shape, dtype=np.float32)


def noise(number: int, shape: tuple[int, ...], seed: int) -> Iterator[Noise]:
    """So many images of noise; the first ones are the same however many are asked for."""
    generator = np.random.default_rng(seed)
    for _ in range(number):
        image = Noise(generator.bit_generator.state, shape)
        yield image
        generator.standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class HeldImages:
    """Some images, one after the other.

    Attributes:
        images: All of one shape.
    """

    images: tuple[HeldImage, ...]

    @classmethod
    def of(cls, images: Iterable[HeldImage]) -> HeldImages:
        """Those that are given."""
        return cls(tuple(images))

    def __len__(self) -> int:
        """How many there are."""
        return len(self.images)

    def rows(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> HeldImages:
        """Some of them; the others are held no longer than elsewhere."""
        return HeldImages(tuple(self.images[at] for at in np.arange(len(self))[chosen]))

    def pixels(self) -> Pixels:
        """What the model reads of all of them, ``[images, colours, height, width]``."""
        return np.stack([image.pixels() for image in self.images])

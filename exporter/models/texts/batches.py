"""Samples in batches, as a model takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.model_folder import PIXELS
from exporter.models.texts.held_images import HeldImages

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Sources:
    """What the encoder of an encoder-decoder reads, or a model of images; a row a sample.

    Attributes:
        arrays: By the model's arguments: ``input_features`` ``[samples, mels, frames]``, float32,
            or ``input_ids`` and ``attention_mask`` ``[samples, tokens]``, int64; none of images.
        mask: ``[samples, positions]`` of the encoder's stream; False marks padding, or the silence
            behind a recording.
        images: Of a model of images these.
    """

    arrays: Mapping[str, NDArray[Any]]
    mask: NDArray[np.bool_]
    images: HeldImages | None = None

    @property
    def are_images(self) -> bool:
        """Whether they are all that the model reads: images, beside which there are no tokens."""
        return self.images is not None

    @property
    def are_recordings(self) -> bool:
        """Whether the encoder hears: sounds, beside which there are a decoder's tokens."""
        return "input_features" in self.arrays

    def rows(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> Sources:
        """Those of some of the samples."""
        arrays = {name: array[chosen] for name, array in self.arrays.items()}
        images = None if self.images is None else self.images.rows(chosen)
        return Sources(arrays, self.mask[chosen], images)

    def given(self) -> dict[str, NDArray[Any]]:
        """What the model is given, by its arguments.

        Those of images are ``pixel_values`` ``[samples, colours, height, width]``, float32: they
        are made anew in each call, and four times as large as what is held.
        """
        if self.images is None:
            return dict(self.arrays)
        return {PIXELS: self.images.pixels()}

    def content(self) -> Iterator[bytes]:
        """All of it, for a hash: images one after the other, as the model reads them."""
        for name in sorted(self.arrays):
            yield self.arrays[name].tobytes()
        for image in () if self.images is None else self.images.images:
            yield image.pixels().tobytes()
        yield self.mask.tobytes()


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a text.

    Attributes:
        number: Of the batch, from 0.
        first_sample: The number of its first sample in the text.
        ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``; False marks padding.
        sources: What the encoder reads, where the tokens are those of a decoder behind one; or
            the images, where a token stands for each position of the stream.
        types: ``[batch, tokens]``, of which text of a pair each token is, where the model is told.
    """

    number: int
    first_sample: int
    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    sources: Sources | None = None
    types: NDArray[np.int64] | None = None

    def trimmed(self) -> Batch:
        """The same without the columns at the end that hold padding alone."""
        width = int(np.flatnonzero(self.mask.any(axis=0)).max(initial=0)) + 1
        ids, mask = self.ids[:, :width], self.mask[:, :width]
        types = None if self.types is None else self.types[:, :width]
        return replace(self, ids=ids, mask=mask, types=types)

    def ids_on(self, device: torch.device | None = None) -> torch.Tensor:
        """The token ids for PyTorch."""
        import torch

        return torch.from_numpy(self.ids).to(device)

    def mask_on(self, device: torch.device | None = None) -> torch.Tensor:
        """The mask for PyTorch, boolean."""
        import torch

        return torch.from_numpy(self.mask).to(device)

    def inputs(self, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        import torch

        if self.sources is not None:
            # A decoder sees what is before a token alone: padding behind it changes nothing.
            arrays = self.sources.given().items()
            given = {name: torch.from_numpy(array).to(device) for name, array in arrays}
            if self.sources.are_images:
                return given
            return {**given, "decoder_input_ids": self.ids_on(device)}
        given = {"input_ids": self.ids_on(device), "attention_mask": self.mask_on(device).long()}
        if self.types is not None:
            given["token_type_ids"] = torch.from_numpy(self.types).to(device)
        return given


def batches_of(
    ids: NDArray[np.int64],
    mask: NDArray[np.bool_],
    size: int,
    sources: Sources | None = None,
    types: NDArray[np.int64] | None = None,
) -> list[Batch]:
    """A text in its order, ``size`` samples at a time."""
    found = []
    for number, start in enumerate(range(0, len(ids), size)):
        rows = slice(start, start + size)
        own = None if sources is None else sources.rows(rows)
        told = None if types is None else types[rows]
        found.append(Batch(number, start, ids[rows], mask[rows], own, told))
    return found

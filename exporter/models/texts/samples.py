"""Samples of token ids, or of images, and what a report says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.artifacts.nouns import IMAGES, RECORDINGS, TEXTS, Nouns
from exporter.files import sha256_pieces
from exporter.models.texts.batches import Batch, Sources, batches_of


@dataclass(frozen=True)
class CalibrationText:
    """Samples of token ids.

    Attributes:
        ref: What the report says about the text.
        input_ids: ``[samples, tokens]``, int64.
        mask: ``[samples, tokens]``, boolean; False marks padding.
        owners: ``[samples]``, of a mixture the number of each sample's text; see
            :mod:`exporter.models.texts.mixtures`.
        sources: Of an encoder-decoder what its encoder reads; the tokens are then the decoder's.
            Of a model of images these; a token then stands for each position of the stream.
        types: ``[samples, tokens]``, int64, of which text of a pair each token is; None where the
            samples are single texts, or the model isn't told.
    """

    ref: CalibrationRef
    input_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    owners: NDArray[np.int64] | None = None
    sources: Sources | None = None
    types: NDArray[np.int64] | None = None

    @classmethod
    def unpadded(cls, input_ids: NDArray[np.int64], source: str, sha256: str) -> CalibrationText:
        """Samples without padding, with what the report says of their text."""
        return cls.padded(input_ids, np.ones(input_ids.shape, np.bool_), source, sha256)

    @classmethod
    def padded(
        cls,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        source: str,
        sha256: str,
        types: NDArray[np.int64] | None = None,
    ) -> CalibrationText:
        """Samples of different lengths, with what the report says of their text."""
        samples, length = input_ids.shape
        ref = CalibrationRef(
            source=source,
            samples=samples,
            sequence_length=length,
            tokens=int(mask.sum()),
            sha256=sha256,
        )
        return cls(ref, input_ids, mask, types=types)

    @property
    def are_images(self) -> bool:
        """Whether the samples are images, beside which there are no tokens."""
        return self.sources is not None and self.sources.are_images

    @property
    def read(self) -> Nouns:
        """What the model reads: texts, images or recordings."""
        if self.are_images:
            return IMAGES
        hears = self.sources is not None and self.sources.are_recordings
        return RECORDINGS if hears else TEXTS

    @property
    def ids_sha256(self) -> str:
        """Of the tokens, and of which of them are padding."""
        tokens = self.input_ids.astype("<i8").tobytes(), self.mask.tobytes()
        read = () if self.sources is None else self.sources.content()
        types = b"" if self.types is None else self.types.astype("<i8").tobytes()
        return sha256_pieces(chain(tokens, read, [types]))

    @property
    def part(self) -> CalibrationRef:
        """What is said of just these samples, by which they are known again."""
        mixture = [] if self.owners is None else [text.part for text in self.apart]
        return self.ref.model_copy(update={"ids_sha256": self.ids_sha256, "mixture": mixture})

    @property
    def parts(self) -> list[CalibrationRef]:
        """The same of each text that has samples in it; of a single text, one."""
        return self.part.texts

    @property
    def apart(self) -> list[CalibrationText]:
        """The texts of a mixture, each by itself; a single text as it is."""
        if self.owners is None:
            return [self]
        rows = [self.owners == number for number in range(len(self.ref.mixture))]
        return [
            replace(self.rows(own), ref=_counted(ref, self.mask[own]), owners=None)
            for ref, own in zip(self.ref.mixture, rows, strict=True)
        ]

    def rows(self, chosen: slice | NDArray[np.bool_]) -> CalibrationText:
        """Some of the samples."""
        mask = self.mask[chosen]
        owners = None if self.owners is None else self.owners[chosen]
        ref = _counted(self.ref, mask)
        if owners is not None:
            counted = [_counted(r, mask[owners == i]) for i, r in enumerate(self.ref.mixture)]
            ref = ref.model_copy(update={"mixture": counted})
        sources = None if self.sources is None else self.sources.rows(chosen)
        types = None if self.types is None else self.types[chosen]
        return CalibrationText(ref, self.input_ids[chosen], mask, owners, sources, types)

    def batches(self, size: int) -> list[Batch]:
        """The samples in their order, ``size`` at a time."""
        return batches_of(self.input_ids, self.mask, size, self.sources, self.types)

    def first_tokens(self, tokens: int) -> CalibrationText:
        """The first samples, enough for a number of tokens."""
        before = np.cumsum(self.mask.sum(axis=1)) - self.mask.sum(axis=1)
        return self.rows(slice(0, int((before < tokens).sum())))


def _counted(ref: CalibrationRef, mask: NDArray[np.bool_]) -> CalibrationRef:
    return ref.model_copy(update={"samples": len(mask), "tokens": int(mask.sum())})

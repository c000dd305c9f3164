"""Samples of a text, and batches of them as a model takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.artifacts.base import IMAGES, RECORDINGS, TEXTS, Nouns
from exporter.files import sha256_pieces
from exporter.models.model_folder import PIXELS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Sources:
    """What the encoder of an encoder-decoder reads, or a model of images; a row a sample."""

    arrays: Mapping[str, NDArray[Any]]  # by the arguments of the model
    mask: NDArray[np.bool_]  # `[samples, positions]` of the encoder's stream

    @property
    def are_images(self) -> bool:
        """Whether they are all that the model reads: images, beside which there are no tokens."""
        return PIXELS in self.arrays

    @property
    def are_recordings(self) -> bool:
        """Whether the encoder hears: sounds, beside which there are a decoder's tokens."""
        return "input_features" in self.arrays

    def __getitem__(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> Sources:
        """Those of some of the samples."""
        arrays = {name: array[chosen] for name, array in self.arrays.items()}
        return Sources(arrays, self.mask[chosen])

    def content(self) -> Iterator[bytes]:
        """All of it, for a hash."""
        for name in sorted(self.arrays):
            yield self.arrays[name].tobytes()
        yield self.mask.tobytes()


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a text."""

    number: int  # of the batch, from 0
    samples: Sequence[int]  # their numbers in the text
    ids: NDArray[np.int64]  # `[batch, tokens]`
    mask: NDArray[np.bool_]  # `[batch, tokens]`; False marks padding
    sources: Sources | None = None
    # `[batch, tokens]`, of which text of a pair each token is, where the model is told
    types: NDArray[np.int64] | None = None

    @property
    def first_sample(self) -> int:
        """The number of the first one."""
        return self.samples[0]

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
            arrays = self.sources.arrays.items()
            given = {name: torch.from_numpy(array).to(device) for name, array in arrays}
            if self.sources.are_images:
                return given
            return {**given, "decoder_input_ids": self.ids_on(device)}
        given = {"input_ids": self.ids_on(device), "attention_mask": self.mask_on(device).long()}
        if self.types is not None:
            given["token_type_ids"] = torch.from_numpy(self.types).to(device)
        return given


def in_couples(size: int, types: NDArray[np.int64] | None) -> int:
    """So many samples in a batch: of pairs an even number, as a reranker orders each two."""
    return size if types is None else size + size % 2


def batches_of(
    ids: NDArray[np.int64],
    mask: NDArray[np.bool_],
    size: int,
    sources: Sources | None = None,
    types: NDArray[np.int64] | None = None,
) -> list[Batch]:
    """A text in its order, ``size`` samples at a time."""
    batches, size = [], in_couples(size, types)
    for number, start in enumerate(range(0, len(ids), size)):
        rows = slice(start, start + size)
        own = None if sources is None else sources[rows]
        parted = None if types is None else types[rows]
        numbers = range(len(ids))[rows]
        batches.append(Batch(number, numbers, ids[rows], mask[rows], own, parted))
    return batches


@dataclass(frozen=True)
class CalibrationText:
    """Samples of token ids."""

    ref: CalibrationRef
    input_ids: NDArray[np.int64]  # `[samples, tokens]`, int64
    mask: NDArray[np.bool_]  # `[samples, tokens]`, boolean; False marks padding
    # `[samples]`, of a mixture the number of each sample's text; see mixtures
    owners: NDArray[np.int64] | None = None
    sources: Sources | None = None
    # `[samples, tokens]`, int64, of which text of a pair each token is
    types: NDArray[np.int64] | None = None
    documents: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.documents):
            object.__setattr__(self, "documents", np.arange(len(self.input_ids)))

    @classmethod
    def unpadded(
        cls,
        input_ids: NDArray[np.int64],
        source: str,
        sha256: str,
        documents: NDArray[np.int64] | None = None,
        content: str = "",
        *,
        mask: NDArray[np.bool_] | None = None,  # None: without padding
        types: NDArray[np.int64] | None = None,
    ) -> CalibrationText:
        """Samples with what the report says of their text."""
        samples, length = input_ids.shape
        mask = np.ones(input_ids.shape, np.bool_) if mask is None else mask
        documents = np.arange(samples) if documents is None else documents
        ref = CalibrationRef(
            source=source,
            samples=samples,
            sequence_length=length,
            tokens=int(mask.sum()),
            sha256=sha256,
            documents=ranges_of(documents),
            content=content,
        )
        return cls(ref, input_ids, mask, types=types, documents=documents)

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
            replace(self._chosen(own), ref=self._counted(ref, own), owners=None)
            for ref, own in zip(self.ref.mixture, rows, strict=True)
        ]

    def rows(self, chosen: slice | NDArray[np.bool_]) -> CalibrationText:
        """Some of the samples."""
        part, ref = self._chosen(chosen), self._counted(self.ref, chosen)
        if part.owners is not None:
            counted = [
                part._counted(own, part.owners == number) for number, own in enumerate(ref.mixture)
            ]
            update = {"mixture": counted, "documents": self.ref.documents}
            ref = ref.model_copy(update=update)
        return replace(part, ref=ref)

    def _chosen(self, chosen: slice | NDArray[np.bool_] | NDArray[np.int64]) -> CalibrationText:
        """Some of the samples, under the reference of all."""
        return CalibrationText(
            self.ref,
            self.input_ids[chosen],
            self.mask[chosen],
            None if self.owners is None else self.owners[chosen],
            None if self.sources is None else self.sources[chosen],
            None if self.types is None else self.types[chosen],
            self.documents[chosen],
        )

    @property
    def clusters(self) -> NDArray[np.int64]:
        """``[samples]``, of which document each is; of a single one each is its own."""
        array = np.zeros_like(self.documents)
        for own in self._owned:
            array[own] = array.max() + 1 + _labels(self.documents[own])
        return array

    def apart_at(self, samples: int, together: int = 1) -> tuple[CalibrationText, CalibrationText]:
        """Two parts that share no document: all but the last ones, and these, of so many samples.

        Those have more where documents are long, and fewer where else the longest one were all that
        is left. Of a single document it is all but its last samples, and these. Of a mixture the
        parts have alike much of each text.
        """
        held = np.zeros(len(self.input_ids), np.bool_)
        for own in self._owned:
            wanted = max(1, round(samples * len(own) / len(held)))
            held[own] = _last(_together(self.documents[own], together), wanted)
        return self.rows(~held), self.rows(held)

    def in_turn(
        self, first: int | None = None, together: int = 1
    ) -> tuple[CalibrationText, CalibrationText]:
        """Two parts that share no document, of alike many samples, or ``first`` in the one.

        A single document's samples are parted one by one; of one sample both parts are that. Of a
        mixture the parts have alike much of each text.
        """
        if len(self.input_ids) <= together:
            return self, self
        other = np.zeros(len(self.input_ids), np.bool_)
        for own in self._owned:
            other[own] = _second(_together(self.documents[own], together), first)
        if not other.any():
            other[-together:] = True
        return self.rows(~other), self.rows(other)

    @property
    def _owned(self) -> list[NDArray[np.int64]]:
        """The samples of each text that has some."""
        owners = np.zeros(len(self.documents)) if self.owners is None else self.owners
        return [np.flatnonzero(owners == owner) for owner in np.unique(owners)]

    def batches(self, size: int) -> list[Batch]:
        """The samples in their order, ``size`` at a time."""
        return batches_of(self.input_ids, self.mask, size, self.sources, self.types)

    def batch(self, samples: Sequence[int]) -> Batch:
        """Some samples, without what is padding in all of them."""
        part = self._chosen(np.array(samples))
        batch = Batch(0, samples, part.input_ids, part.mask, part.sources, part.types)
        return batch.trimmed()

    def first_tokens(self, tokens: int) -> CalibrationText:
        """The first samples, enough for a number of tokens."""
        before = np.cumsum(self.mask.sum(axis=1)) - self.mask.sum(axis=1)
        return self.rows(slice(0, int((before < tokens).sum())))

    def _counted(self, ref: CalibrationRef, chosen: slice | NDArray[np.bool_]) -> CalibrationRef:
        mask, documents = self.mask[chosen], ranges_of(self.documents[chosen])
        update = {"samples": len(mask), "tokens": int(mask.sum()), "documents": documents}
        return ref.model_copy(update=update)


def _labels(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """From 0 on, in the order in which documents appear; a number a sample of a single one."""
    numbers: dict[int, int] = {}
    labels = [numbers.setdefault(document, len(numbers)) for document in documents.tolist()]
    return np.array(labels, np.int64) if len(numbers) > 1 else np.arange(len(labels))


def _together(documents: NDArray[np.int64], together: int) -> NDArray[np.int64]:
    """Labels of which so many samples, one after the other, have the same."""
    return _labels(_labels(documents)[np.arange(len(documents)) // together * together])


def _last(labels: NDArray[np.int64], wanted: int) -> NDArray[np.bool_]:
    """Whether each sample is of the last documents, which have so many samples together.

    They are two at least where others are left for that, to be parted again.
    """
    sizes = np.bincount(labels).tolist()
    fewest, last, rest = min(2, wanted), list[int](), len(labels)

    def takes(number: int) -> bool:
        held = len(labels) - rest
        return (held < wanted or len(last) < fewest) and rest - sizes[number] >= sizes[number] // 2

    for number in reversed(range(len(sizes))):
        short = sizes[number] <= min(-(-wanted // fewest), wanted - (len(labels) - rest))
        if short and rest > sizes[number]:
            last.append(number)
            rest -= sizes[number]
    for number in sorted(
        {*range(len(sizes))} - {*last}, key=lambda number: (sizes[number], number)
    ):
        if rest > sizes[number] and takes(number):
            last.append(number)
            rest -= sizes[number]
    return np.isin(labels, last)


def _second(labels: NDArray[np.int64], first: int | None) -> NDArray[np.bool_]:
    """Whether each sample is of every second document, about, or behind the ``first`` samples."""
    sizes = np.bincount(labels)
    most, counts = len(labels) if first is None else first, [0, 0]
    other = np.zeros(len(sizes), np.bool_)
    for number, size in enumerate(sizes.tolist()):
        behind = counts[0] > counts[1] or (number > 0 and counts[0] + size > most)
        other[number] = behind
        counts[behind] += size
    return np.asarray(other[labels], np.bool_)


def ranges_of(documents: NDArray[np.int64]) -> str:
    """Numbers in words: ``0-3,7``."""
    numbers = np.unique(documents)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs if len(r))

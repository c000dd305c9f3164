"""Which documents of a text belong together, and in which order its parts are drawn."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np

S = TypeVar("S")
T = TypeVar("T")
Unit = tuple[str, ...]

FEWEST_UNITS = 8
"""Two for each of the four parts that choose, fit, stop and judge."""
_MOST_STRETCHES = 32
_CHARACTERS_A_TOKEN = 10  # so that the shortest unit has two samples or so
_GAP = 0.1  # of a stretch, at its end
_ROUND = 64  # samples that are drawn before a unit is drawn from again
_SLOTS = 1024
_NEAR = 400  # characters in which a line begins
_SEED = 20_240
_KEY_BYTES = 6
_SKETCH = 48  # keys
_FEW, _SHARE = 10, 0.05  # of the documents: a paragraph that more of them have ties none
_PARAGRAPH_CHARACTERS = 60  # shorter paragraphs repeat by chance
_TITLE = re.compile(r"^ ?= (?!=)[^\n]*[^\s=] =[ \r]*$", re.MULTILINE)  # WikiText
_HEADING = re.compile(r"(?:\A|(?<=\n\n)|(?<=\n\r\n))# \S[^\n]*(?=\r?\n\r?\n)")  # Markdown


def normalised_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs with a single space for all white space; empty ones too."""
    return (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def keys_of(document: str) -> frozenset[int]:
    """What a document is known by wherever it stands: its long paragraphs, else all of it."""
    parts = [part for part in normalised_paragraphs(document) if len(part) >= _PARAGRAPH_CHARACTERS]
    return frozenset(map(_key, parts or [" ".join(document.split())]))


def _key(paragraph: str) -> int:
    digest = hashlib.blake2b(paragraph.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES)
    return int.from_bytes(digest.digest(), "big")


def unrelated(documents: Sequence[str]) -> list[list[int]]:
    """The numbers of documents in groups that share no long paragraph, by their first number."""
    if len(documents) == 1:
        return [[0]]
    above = list(range(len(documents)))

    def first(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    holder: dict[int, int] = {}
    for number, keys in enumerate(_tying_keys(documents)):
        for key in keys:
            one, other = sorted((first(holder.setdefault(key, number)), first(number)))
            above[other] = one
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(documents)):
        groups[first(number)].append(number)
    return list(groups.values())


def _tying_keys(documents: Sequence[str]) -> list[frozenset[int]]:
    """The keys of each document without those of paragraphs that many have, such as a licence."""
    keys = list(map(keys_of, documents))
    most = max(_FEW, _SHARE * len(documents))
    usual = {key for key, number in Counter(chain.from_iterable(keys)).items() if number > most}
    return [own - usual or own for own in keys]


def halves(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two parts of about the same size that share no long paragraph, each in the order given.

    A document whose paragraphs all stand in another one is left out.
    """
    whole = [_without_contained(group, documents) for group in unrelated(documents)]
    sizes = {tuple(group): sum(len(documents[n]) for n in group) for group in whole}
    parts: tuple[list[int], list[int]] = ([], [])
    lengths = [0, 0]
    for group in sorted(sizes, key=lambda group: (-sizes[group], group)):
        smaller = lengths.index(min(lengths))
        parts[smaller].extend(group)
        lengths[smaller] += sizes[group]
    first, second = ([documents[number] for number in sorted(part)] for part in parts)
    return first, second


def _without_contained(group: Sequence[int], documents: Sequence[str]) -> list[int]:
    keys = {number: keys_of(documents[number]) for number in group}
    kept: list[int] = []
    for number in sorted(group, key=lambda number: (-len(keys[number]), number)):
        if not any(keys[number] <= keys[other] for other in kept):
            kept.append(number)
    return sorted(kept)


def articles(text: str) -> list[str]:
    """A text cut before each title of WikiText, or else of Markdown, that stands alone."""
    for heading in (_TITLE, _HEADING):
        starts = [match.start() for match in heading.finditer(text)]
        if len(starts) > 1:
            ends = [*starts[1:], len(text)]
            return [text[start:end] for start, end in zip([0, *starts[1:]], ends, strict=True)]
    return [text]


def is_title(line: str) -> bool:
    """Whether a line is the title of an article of WikiText."""
    return _TITLE.fullmatch(line.rstrip()) is not None


@dataclass(frozen=True)
class Content:
    """What a text is known by under whatever name, in whatever order: keys of its paragraphs."""

    keys: frozenset[int]
    is_whole: bool = True

    @classmethod
    def of(cls, documents: Iterable[str]) -> Content:
        """That of a text."""
        return cls(frozenset(chain.from_iterable(map(keys_of, documents))))

    @classmethod
    def read(cls, written: str) -> Content:
        """What :meth:`written` wrote; nothing of what it didn't."""
        try:
            data = base64.b64decode(written, validate=True)
        except ValueError:
            data = b""
        parts = (data[at : at + _KEY_BYTES] for at in range(0, len(data), _KEY_BYTES))
        keys = frozenset(int.from_bytes(part, "big") for part in parts)
        return cls(keys, is_whole=len(keys) < _SKETCH)

    def written(self) -> str:
        """The lowest keys, in base64."""
        keys = sorted(self.keys)[:_SKETCH]
        return base64.b64encode(b"".join(key.to_bytes(_KEY_BYTES, "big") for key in keys)).decode()

    def is_shared(self, other: Content) -> bool:
        """Whether half of one text or more is in the other, as far as both are known."""
        known = [content.keys for content in (self, other) if not content.is_whole]
        end = min(map(max, known), default=1 << 8 * _KEY_BYTES)
        mine, others = ({key for key in content.keys if key <= end} for content in (self, other))
        return 0 < min(len(mine), len(others)) <= 2 * len(mine & others)


@dataclass(frozen=True)
class Units:
    """The parts of a text that serve one end each, in the order in which they are drawn."""

    parts: tuple[Unit, ...]
    are_stretches: bool = False

    @classmethod
    def of(cls, documents: Sequence[str], length: int, *, whole: bool = False) -> Units:
        """Those of a text that is read in samples of so many tokens; ``whole`` cuts none."""
        size = _CHARACTERS_A_TOKEN * length
        parts = _bundled(documents, size)
        if len(parts) < FEWEST_UNITS and not whole:
            cut = [part for document in documents for part in _stretches(document, size, documents)]
            if len(cut) > len(documents):
                return cls(_bundled(cut, size // 2), are_stretches=True)
        return cls(parts)

    def keys(self, numbers: Iterable[range]) -> frozenset[int]:
        """What some of the units are known by."""
        chosen = set(chain.from_iterable(numbers))
        owners = [number for number, unit in enumerate(self.parts) for _ in unit]
        keys = _tying_keys(list(chain.from_iterable(self.parts)))
        return frozenset().union(
            *(own for owner, own in zip(owners, keys, strict=True) if owner in chosen)
        )

    def apart_from(self, keys: frozenset[int]) -> Units:
        """Without those units that share a long paragraph with what is known by ``keys``."""
        if not keys:
            return self
        kept = (
            () if any(keys & keys_of(document) for document in unit) else unit
            for unit in self.parts
        )
        return replace(self, parts=tuple(kept))

    def drawn(
        self,
        segments: Callable[[Unit], Sequence[S]],
        read: Callable[[S], Sequence[T]],
        *,
        by_size: bool = False,
    ) -> Iterator[tuple[int, T]]:
        """All samples at random, always in the same order, with the numbers of their units."""
        waiting = {
            number: self._scattered(number, segments(unit), read)
            for number, unit in enumerate(self.parts)
            if unit
        }
        turns = self._turns(by_size)
        while waiting:
            number = next(turns)
            if number in waiting:
                try:
                    yield number, next(waiting[number])
                except StopIteration:
                    del waiting[number]

    @property
    def _at_a_visit(self) -> int:
        return math.ceil(_ROUND / len(self.parts))

    def _turns(self, by_size: bool) -> Iterator[int]:
        numbers = np.arange(len(self.parts))
        order = np.repeat(numbers, self._at_a_visit)
        if by_size:
            sizes = np.array([sum(map(len, unit)) for unit in self.parts])
            often = np.maximum(1, np.rint(_SLOTS * sizes / max(1, sizes.sum()))).astype(np.int64)
            order = np.random.default_rng(_SEED).permutation(np.repeat(numbers, often))
        while True:
            yield from order.tolist()

    def _scattered(
        self, number: int, segments: Sequence[S], read: Callable[[S], Sequence[T]]
    ) -> Iterator[T]:
        """A unit's samples at random; those of one visit in the order of the text."""
        rng, together = np.random.default_rng((_SEED, number)), self._at_a_visit
        for place in rng.permutation(len(segments)):
            samples = read(segments[place])
            order = rng.permutation(len(samples))
            for start in range(0, len(order), together):
                yield from (samples[n] for n in sorted(order[start : start + together]))


def scattered(items: Sequence[T]) -> list[T]:
    """All of them at random, always in the same order."""
    return [items[n] for n in np.random.default_rng(_SEED).permutation(len(items))]


def _bundled(documents: Sequence[str], size: int) -> tuple[Unit, ...]:
    """Unrelated groups in a random order; short ones are put together."""
    groups = [tuple(documents[number] for number in group) for group in unrelated(documents)]
    kept: list[Unit] = []
    short: Unit = ()
    for group in scattered(groups):
        if sum(map(len, group)) >= size:
            kept.append(group)
            continue
        short += group
        if sum(map(len, short)) >= size:
            kept.append(short)
            short = ()
    if short and kept:
        kept[-1] += short
    # What is drawn first isn't left for other ends.
    large = sum(map(len, documents)) / 4
    return tuple(sorted(kept, key=lambda unit: sum(map(len, unit)) > large)) or (short,)


def _stretches(document: str, size: int, documents: Sequence[str]) -> Iterator[str]:
    """Parts of a long document, each without its end; a short one as it is."""
    size = max(size, sum(map(len, documents)) // _MOST_STRETCHES)
    number = len(document) // size
    if number < 2:
        yield document
        return
    starts = [_line_start(document, len(document) * n // number) for n in range(number)]
    for start, end in zip(starts, [*starts[1:], len(document)], strict=True):
        yield document[start : end - int(_GAP * (end - start))]


def _line_start(document: str, place: int) -> int:
    """The first beginning of a line, or else of a word, near behind a place."""
    near = document[place : place + _NEAR]
    for mark in ("\n\n", "\n", " "):
        if place and (behind := near.find(mark)) >= 0:
            return place + behind + len(mark)
    return place

"""Which documents of a text belong together: those that share a paragraph."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

_PARAGRAPH_CHARACTERS = 60  # shorter paragraphs repeat by chance
_TITLE = re.compile(r"^ ?= (?!=)[^\n]*[^\s=] =[ \r]*$", re.MULTILINE)  # WikiText
_HEADING = re.compile(r"(?:\A|(?<=\n\n))# \S[^\n]*(?=\n\n)")  # Markdown


def normalised_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs with a single space for all white space; empty ones too."""
    return (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))


def keys_of(document: str) -> frozenset[int]:
    """What a document is known by wherever it stands: its long paragraphs, else all of it."""
    parts = [part for part in normalised_paragraphs(document) if len(part) >= _PARAGRAPH_CHARACTERS]
    return frozenset(map(_key, parts or [" ".join(document.split())]))


def _key(paragraph: str) -> int:
    digest = hashlib.blake2b(paragraph.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def unrelated(documents: Sequence[str]) -> list[list[int]]:
    """The numbers of documents in groups that share no long paragraph, by their first number."""
    above = list(range(len(documents)))

    def first(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    holder: dict[int, int] = {}
    for number, document in enumerate(documents):
        for key in keys_of(document):
            one, other = sorted((first(holder.setdefault(key, number)), first(number)))
            above[other] = one
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(documents)):
        groups[first(number)].append(number)
    return list(groups.values())


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

"""Which rows of tokens share their beginning, and which of them run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LEAST_SAVING = 0.25  # of a row's tokens; below that a run of its own costs less
_MOST_CUT = 4  # tokens that a group's shared part may lose for the company of others


class TokenRow(NamedTuple):
    """Tokens to run, and those that its last positions are asked about."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def free(self) -> int:
        """Tokens at the start whose predictions nobody asks for."""
        return len(self.tokens) - len(self.targets)


class Group(NamedTuple):
    """Rows, by number, whose first ``shared`` tokens are the same and are not asked about."""

    members: tuple[int, ...]
    shared: int


def groups(rows: Sequence[TokenRow], *, share: bool) -> list[Group]:
    """Joins neighbours in dictionary order where that saves enough tokens.

    Args:
        rows: In any order.
        share: False puts each row in a group of its own.
    """
    found: list[Group] = []
    for number in sorted(range(len(rows)), key=lambda number: rows[number].tokens):
        joined = _joined(found[-1], number, rows) if share and found else None
        if joined is None:
            found.append(Group((number,), 0))
        else:
            found[-1] = joined
    return found


def _joined(group: Group, number: int, rows: Sequence[TokenRow]) -> Group | None:
    own, last = rows[number], rows[group.members[-1]]
    before = group.shared if len(group.members) > 1 else last.free
    shared = min(_common(last.tokens, own.tokens), own.free, before)
    saved = shared - (len(group.members) - 1) * (before - shared)
    if shared == 0 or saved < _LEAST_SAVING * len(own.tokens):
        return None
    return Group((*group.members, number), shared)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def batches(
    found: Sequence[Group], rows: Sequence[TokenRow], *, most_rows: int, most_tokens: int
) -> Iterator[list[Group]]:
    """Puts groups of like lengths together; what they share is cut to the least of them.

    Args:
        found: From :func:`groups`.
        rows: The same.
        most_rows: In one run; a group that has more is split.
        most_tokens: In one run, padding included; a single group may have more.
    """
    pieces = [piece for group in found for piece in _split(group, most_rows)]
    batch: list[Group] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.shared, -_widest([piece], rows))):
        if batch and not _fits([*batch, piece], rows, most_rows, most_tokens):
            yield _cut(batch)
            batch = []
        batch.append(piece)
    if batch:
        yield _cut(batch)


def _split(group: Group, most_rows: int) -> Iterator[Group]:
    for start in range(0, len(group.members), most_rows):
        yield Group(group.members[start : start + most_rows], group.shared)


def _fits(batch: list[Group], rows: Sequence[TokenRow], most_rows: int, most_tokens: int) -> bool:
    least = batch[-1].shared
    if batch[0].shared - least > (_MOST_CUT if least else 0):
        return False
    count = sum(len(group.members) for group in batch)
    return count <= most_rows and count * _widest(_cut(batch), rows) <= most_tokens


def _widest(batch: list[Group], rows: Sequence[TokenRow]) -> int:
    """Columns of a run: the longest row without what is shared."""
    return max(
        len(rows[number].tokens) - group.shared for group in batch for number in group.members
    )


def _cut(batch: list[Group]) -> list[Group]:
    least = min(group.shared for group in batch)
    return [Group(group.members, least) for group in batch]

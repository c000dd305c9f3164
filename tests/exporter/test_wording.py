"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from exporter.wording import are, counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 blocks"), (1, "1 block"), (2, "2 blocks"), (1.0, "1 block")]
)
def test_one_is_one(number: float, said: str) -> None:
    assert counted(number, "block") == said


def test_the_verb_goes_with_the_number() -> None:
    assert [are(number) for number in (0, 1, 2)] == ["are", "is", "are"]


def test_a_plural_of_its_own() -> None:
    assert counted(1, "branch", "branches") == "1 branch"
    assert counted(3, "branch", "branches") == "3 branches"
    assert counted(1_234_567, "token") == "1234567 tokens"

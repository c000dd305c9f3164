"""What one process of a training makes for all."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.errors import HealingError
from tests.raising import raises

pytest.importorskip("torch")

from exporter.heal.distill.workers import Workers

pytestmark = pytest.mark.torch


def _fails() -> Any:
    raise OSError("full")


def test_the_process_that_fails_says_why_and_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Workers, "from_first", lambda _, value: told.append(value) or value)
    with pytest.raises(OSError, match="full"):
        Workers().once(_fails)
    assert told == [(None, "full")]


def test_the_others_end_with_the_first() -> None:
    class Other(Workers):
        def __init__(self) -> None:
            self.count, self._number = 2, 1

        def from_first(self, value: Any) -> Any:
            return (None, "full") if failing else (5, "")

    failing = True
    with raises(HealingError, "first-process-failed", "full"):
        Other().once(lambda: pytest.fail("only the first makes it"))
    failing = False
    assert Other().once(lambda: pytest.fail("only the first makes it")) == 5

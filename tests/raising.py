"""Holds errors by class, code and the fields that they name, never by their sentences."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar
from unittest import mock

import pytest

from exporter.cli import cli
from exporter.errors import DepthcutError

E = TypeVar("E", bound=DepthcutError)


@contextlib.contextmanager
def raises(kind: type[E], code: str = "", *named: object) -> Iterator[pytest.ExceptionInfo[E]]:
    """Expects an error of a class, with a code, that names some fields."""
    with pytest.raises(kind) as caught:
        yield caught
    _hold(caught.value, code, named)


@contextlib.contextmanager
def ends_in(kind: type[DepthcutError], code: str = "", *named: object) -> Iterator[None]:
    """As :func:`raises`, for a command line in this process, which prints its error."""
    ended: list[DepthcutError] = []
    run = cli.main

    def main(*args: Any, **asked: Any) -> Any:
        try:
            return run(*args, **asked)
        except DepthcutError as error:
            ended.append(error)
            raise

    with mock.patch.object(cli, "main", main):
        yield
    (error,) = ended
    assert isinstance(error, kind)
    _hold(error, code, named)


def _hold(error: DepthcutError, code: str, named: Iterable[object]) -> None:
    assert error.code == code
    for item in named:
        assert tells(str(error), item), f"{item!r} is not named: {error}"


def tells(text: str, field: object) -> bool:
    """Whether a text names a field; a number as a whole number, not within another."""
    if isinstance(field, int | float):
        return re.search(rf"(?<![\w.]){re.escape(str(field))}(?!\w|\.\d)", text) is not None
    return str(field) in text

"""Holds errors by class, code and the fields that they name, never by their sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import pytest

from exporter.errors import DepthcutError

E = TypeVar("E", bound=DepthcutError)


@contextlib.contextmanager
def raises(kind: type[E], code: str = "", *named: object) -> Iterator[pytest.ExceptionInfo[E]]:
    """Expects an error of a class, with a code, that names some fields.

    Args:
        kind: The class; subclasses count.
        code: The error's code; empty where the class alone tells it.
        named: What message or hint must name: paths, options, numbers, layers, tensors.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code
    for each in named:
        assert str(each) in str(caught.value)

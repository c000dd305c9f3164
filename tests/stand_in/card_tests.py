"""What a rehearsed session runs in the place of tests/gpu; by its name pytest passes it over."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_right() -> None: ...


def test_wrong() -> None:
    raise AssertionError


def test_elsewhere() -> None:
    pytest.skip()

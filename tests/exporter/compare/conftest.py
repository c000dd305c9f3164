"""What tests of comparisons share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.text_graphs import write_tiny_lm


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(rows=[], seen_on=lambda machine: machine)
    monkeypatch.setattr("exporter.compare.session.time_all", lambda *_: nothing)


@pytest.fixture
def arms(tmp_path: Path) -> tuple[Path, Path]:
    """A language model and the same without a cache of its first layer; random tokens judge."""
    return write_tiny_lm(tmp_path / "baseline"), write_tiny_lm(tmp_path / "candidate", layers=(1,))

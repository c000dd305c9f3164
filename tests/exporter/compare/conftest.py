"""What tests of comparisons share."""

from __future__ import annotations

import pytest

from exporter.compare.latency import Timed


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.compare.session.time_all", lambda *_: Timed())

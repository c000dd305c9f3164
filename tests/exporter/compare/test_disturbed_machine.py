"""What a comparison does where the machine disturbs its measurement."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from exporter.artifacts import LatencyRow, MachineState
from exporter.compare import latency
from exporter.compare import latency as timing_session
from exporter.compare.arms import Pair
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.errors import DisturbedMachineError
from tests.heard import Heard
from tests.raising import raises

OTHERS = {"steal_share": 0.5}


def chunks(*_: Any, after_chunk: Callable[[], None], **__: Any) -> list[LatencyRow]:
    for _chunk in range(6):
        after_chunk()
    return []


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Heard]]:
    """Times six chunks on a machine of which each look says this; the looks, and what was said."""

    def call(seen: dict[str, float], options: TimingOptions) -> tuple[int, Heard]:
        state = MachineState(seconds=0).model_copy(update=seen)
        monkeypatch.setattr(timing_session, "machine_state", lambda *_: state)
        monkeypatch.setattr(latency, "shapes_of", lambda _: ["a shape"])
        monkeypatch.setattr(latency, "generations_of", lambda _: [])
        monkeypatch.setattr(timing_session, "machine_remarks", lambda *_: [])
        monkeypatch.setattr(timing_session, "measure_rows", chunks)
        heard = Heard()
        pair = SimpleNamespace(
            options=CompareOptions(timing=options), arms={}, judged=(), progress=heard,
            baseline=SimpleNamespace(runner=SimpleNamespace(threads=1)), on_gpu=False,
            in_turns=False, vocabulary=lambda: 9,
        )  # fmt: skip
        return len(latency.time_all(cast("Pair", pair)).states), heard

    return call


def test_a_disturbed_measurement_stops(timed: Callable[..., Any]) -> None:
    with raises(DisturbedMachineError, "disturbed-machine", "--on-disturbance"):
        timed(OTHERS, TimingOptions())


def test_a_disturbed_measurement_goes_on_and_warns_once(timed: Callable[..., Any]) -> None:
    looks, heard = timed(OTHERS, TimingOptions(on_disturbance="warn"))
    assert looks == 7
    assert len(heard.lines) == 1


@pytest.mark.parametrize("what", ["stop", "warn"])
def test_an_undisturbed_measurement_goes_on(timed: Callable[..., Any], what: Any) -> None:
    looks, heard = timed({"steal_share": 0.0}, TimingOptions(on_disturbance=what))
    assert looks == 7
    assert heard.lines == []

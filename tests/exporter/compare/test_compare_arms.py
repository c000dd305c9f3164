"""What may stand in a comparison besides two ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from exporter.artifacts import LatencyRow, MachineState
from exporter.compare import latency
from exporter.compare import latency as timing_session
from exporter.compare.arms import Pair
from exporter.compare.options import CompareOptions, TimingOptions
from exporter.compare.session import compare
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.registry import RUNNERS, Backend
from exporter.errors import ComparisonError, DisturbedMachineError, UsageError
from tests.raising import raises
from tests.reading import Heard
from tests.text_graphs import write_tiny_lm

OPTIONS = CompareOptions(
    threads=1,
    prefill_lengths=(4,),
    decode_past_lengths=(),
    rounds=2,
    eval_tokens=32,
    eval_sequence_length=16,
)


@pytest.fixture
def arms(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny_lm(tmp_path / "baseline"), write_tiny_lm(tmp_path / "candidate", layers=(1,))


def test_references_are_recorded_by_the_end_of_their_path(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    third, again = tmp_path / "third", tmp_path / "again" / "third"
    for folder in (third, again):
        write_tiny_lm(folder, noise=0.1)
    report = compare(*arms, OPTIONS, references=[third])
    assert list(report.arms.references) == ["third"]
    assert report.made_from["third"] == report.arms.references["third"].sha256
    report = compare(*arms, OPTIONS, references=[third, again])
    assert list(report.arms.references) == [str(third), str(again)]
    with raises(UsageError, "named-twice", "third"):
        compare(*arms, OPTIONS, references=[third, third])


def test_a_reference_of_another_interface_is_refused(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_tiny_lm(tmp_path / "other", layers=(0, 1, 2))
    with raises(ComparisonError, "other-inputs", "reference other"):
        compare(*arms, OPTIONS, references=[other])


def test_a_reference_may_want_token_types_that_the_baseline_does_without(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_tiny_lm(tmp_path / "other", extra_input="token_type_ids")
    report = compare(*arms, OPTIONS, references=[other])
    assert "other" in report.arms.references
    with raises(ComparisonError, "other-inputs", "candidate", "'token_type_ids'"):
        compare(arms[0], other, OPTIONS)
    strange = write_tiny_lm(tmp_path / "strange", extra_input="pixel_values")
    with raises(ComparisonError, "other-inputs", "reference strange", "'pixel_values'"):
        compare(*arms, OPTIONS, references=[strange])


class OtherRunner(OnnxRuntimeRunner):
    """As a newcomer's backend would be: a class in a file, and its row in the registry."""

    backend = "other"


def test_a_backend_is_a_class_and_a_row(
    arms: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS, "other", Backend(__name__, OtherRunner.__name__))
    result = compare(*(f"other:{arm}" for arm in arms), OPTIONS, references=[arms[0]]).arms
    assert (result.baseline.backend, result.candidate.backend) == ("other", "other")
    assert result.baseline.path.startswith("other:")
    assert [arm.backend for arm in result.references.values()] == ["onnxruntime"]
    with pytest.raises(ComparisonError):
        compare(f"other:{arms[0]}", arms[1], OPTIONS)


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

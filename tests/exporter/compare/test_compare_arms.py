"""What may stand in a comparison besides two ONNX files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_lm import write_tiny_lm

from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.registry import RUNNERS, Backend
from exporter.errors import ComparisonError, UsageError
from tests.raising import raises

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
    found = compare(*(f"other:{arm}" for arm in arms), OPTIONS, references=[arms[0]]).arms
    assert (found.baseline.backend, found.candidate.backend) == ("other", "other")
    assert found.baseline.path.startswith("other:")
    assert [arm.backend for arm in found.references.values()] == ["onnxruntime"]
    with pytest.raises(ComparisonError):
        compare(f"other:{arms[0]}", arms[1], OPTIONS)

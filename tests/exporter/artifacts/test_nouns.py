"""What a model reads, by the name of its class."""

from __future__ import annotations

import pytest

from exporter.artifacts.base import IMAGES, RECORDINGS, TEXTS, Nouns, nouns_of
from exporter.report.words import read_by, shape_words, short_shape
from tests.made_reports import gate_report, gate_row


@pytest.mark.parametrize(
    ("architecture", "read"),
    [
        ("ViTForImageClassification", IMAGES),
        ("DeiTForImageClassificationWithTeacher", IMAGES),
        ("WhisperForConditionalGeneration", RECORDINGS),
        ("T5ForConditionalGeneration", TEXTS),
        ("BertForSequenceClassification", TEXTS),
    ],
)
def test_a_models_class_says_what_it_reads(architecture: str, read: Nouns) -> None:
    assert nouns_of(architecture) == read


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_rows_length_is_called_what_it_counts(read: Nouns) -> None:
    row = gate_row(100, phase="encode", counts=read.parts)
    result, short = shape_words(row), short_shape(row)
    assert ("tokens" in result) is (read == TEXTS)
    assert ("patches" in result) is (read == IMAGES)
    # A recording has one length, which is no number that anyone gave.
    assert ("100" in result) is ("100" in short) is (read != RECORDINGS)
    assert ("recording" in result) is ("recording" in short) is (read == RECORDINGS)


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_report_tells_what_its_models_read_by_what_was_timed(read: Nouns) -> None:
    rows = [gate_row(100, phase="encode", counts=read.parts), gate_row(4)]
    assert read_by(gate_report(rows)) == read

"""What a model reads, by the name of its class."""

from __future__ import annotations

import pytest
from made_reports import gate_report, gate_row

from exporter.artifacts import CalibrationRef, Healing, PlanParts, Training, TrainingCheck
from exporter.artifacts.nouns import IMAGES, RECORDINGS, TEXTS, Nouns, nouns_of
from exporter.report.sections.healing import healing_grid, healing_words
from exporter.report.sections.parts import parts_blocks
from exporter.report.words import read_by, shape_words, short_shape


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


REF = CalibrationRef(source="photos", samples=8, sequence_length=197, tokens=1576, sha256="0" * 64)
CHECKS = [
    TrainingCheck(tokens=tokens, seconds=1.0, training_loss=1.0, held_out_loss=1.0)
    for tokens in (0, 8)
]
HEALING = Healing(
    asked="distill", rank=None, sequential=False, calibration=[REF], branches=[], parameters=0,
    changed_weights=3,
    training=Training(
        train="all", loss="classes", trained_parameters=8, steps=1, tokens=8, seconds=1.0,
        stopped_by="no_gain", stopped_on=REF, checks=CHECKS,
    ),
)  # fmt: skip


def test_images_have_no_tokens_and_texts_have() -> None:
    images, texts = REF.describe(IMAGES), REF.describe()
    assert "8 images" in images
    assert "token" not in images
    assert "1,576 tokens" in texts


@pytest.mark.parametrize("read", [IMAGES, TEXTS])
def test_a_plans_parts_are_called_what_they_are(read: Nouns) -> None:
    (found,) = parts_blocks(PlanParts(chosen_on=[REF], judged_on=[REF]), read=read)
    told = " ".join(map(str, getattr(found, "lines", None) or vars(found).values())).lower()
    assert ("images" in told) is (read == IMAGES)
    assert ("text" in told) is (read == TEXTS)


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_rows_length_is_called_what_it_counts(read: Nouns) -> None:
    row = gate_row(100, phase="encode", counts=read.parts)
    told, short = shape_words(row), short_shape(row)
    assert ("tokens" in told) is (read == TEXTS)
    assert ("patches" in told) is (read == IMAGES)
    # A recording has one length, which is no number that anyone gave.
    assert ("100" in told) is ("100" in short) is (read != RECORDINGS)
    assert ("recording" in told) is ("recording" in short) is (read == RECORDINGS)


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_report_tells_what_its_models_read_by_what_was_timed(read: Nouns) -> None:
    rows = [gate_row(100, phase="encode", counts=read.parts), gate_row(4)]
    assert read_by(gate_report(rows)) == read


def test_the_table_of_a_healing_is_of_what_the_model_reads() -> None:
    text, images = (healing_grid(HEALING, read=read) for read in (TEXTS, IMAGES))
    assert text.header[0] == "text"
    assert images.header[0] == "images"
    assert "text" not in healing_words(HEALING, IMAGES)
    assert "text" in healing_words(HEALING)

"""What a model reads, by the name of its class."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from made_reports import gate_report, gate_row

from exporter.artifacts import (
    AnswerDamage,
    CalibrationRef,
    HealedText,
    Healing,
    PlanParts,
    Training,
    TrainingCheck,
)
from exporter.artifacts.base import IMAGES, RECORDINGS, TEXTS, Nouns, nouns_of
from exporter.artifacts.latency import Shape
from exporter.heal.domains import warnings_of
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts, choice_warnings
from exporter.models.texts.batches import CalibrationText, HeldImages, Sources, noise
from exporter.report.sections.blocks import parts_blocks
from exporter.report.sections.healing import healing_grid, healing_words
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
def test_progress_calls_a_shape_what_it_counts(read: Nouns) -> None:
    told = str(Shape("encode", 2, 100, counts=read.parts))
    assert "batch 2" in told
    assert ("recording" in told) is ("100" not in told) is (read == RECORDINGS)
    assert ("patches" in told) is (read == IMAGES)
    assert told != str(Shape("encode", 1, 100, counts=read.parts))


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_warning_of_a_healing_asks_for_more_of_what_is_read(read: Nouns) -> None:
    texts = [healed_text("calibration", 0.1), healed_text("other", 0.5)]
    unsure = [each.model_copy(update={"gain_std_error": 1.0}) for each in texts]
    for found in (warnings_of(texts, read), warnings_of(unsure, read)):
        told = " ".join(found)
        assert read.much in told
        assert ("text" in told) is (read == TEXTS)


def healed_text(role: Literal["calibration", "other"], healed: float) -> HealedText:
    def damage(rise: float) -> AnswerDamage:
        return AnswerDamage(
            perplexity=10.0, log_perplexity_increase=rise, log_perplexity_increase_std_error=0.01,
            kl=rise, kl_std_error=0.01, top1_agreement=0.9,
        )  # fmt: skip

    return HealedText(
        role=role, text=REF, baseline_perplexity=9.0, dropped=damage(0.6), healed=damage(healed),
        gain=0.6 - healed, gain_std_error=0.01,
    )  # fmt: skip


@pytest.mark.parametrize("read", [IMAGES, RECORDINGS, TEXTS])
def test_a_warning_of_a_short_calibration_asks_for_more_of_what_is_read(read: Nouns) -> None:
    one = CalibrationText.unpadded(np.zeros((1, 4), np.int64), "few", "0" * 64)
    images = HeldImages.of(noise(1, (3, 2, 2), 0)) if read == IMAGES else None
    sounds = {"input_features": np.zeros((1, 2, 2), np.float32)} if read == RECORDINGS else {}
    if read != TEXTS:
        one = replace(one, sources=Sources(sounds, one.mask, images))
    assert one.read == read
    texts = HealingTexts(one, (one.ref,), (one,), None, chose=(one.ref.source,))
    found = choice_warnings(HealOptions(kind="fold"), texts)
    assert len(found) == 2
    for told in found:
        assert f"more {read.much}" in told
        assert ("text" in told) is (read == TEXTS)


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

"""What a model reads, by the name of its class."""

from __future__ import annotations

import pytest

from exporter.artifacts import CalibrationRef, PlanParts
from exporter.artifacts.nouns import IMAGES, RECORDINGS, TEXTS, Nouns, nouns_of
from exporter.report.sections.parts import parts_blocks


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

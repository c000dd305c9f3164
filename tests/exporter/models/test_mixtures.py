"""Several texts as one: alike much of each, and each known again."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.artifacts import CalibrationRef
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.mixtures import joined, samples_of, seed_of_all, specs_of


def _text(name: str, samples: int, first: int = 0) -> CalibrationText:
    ids = np.arange(first, first + samples * 4, dtype=np.int64).reshape(samples, 4)
    ref = CalibrationRef(
        source=name, samples=samples, sequence_length=4, tokens=4 * samples, sha256=name * 64,
        documents=f"0-{samples - 1}",
    )  # fmt: skip
    return CalibrationText(ref, ids, np.ones_like(ids, dtype=np.bool_))


def test_a_mixture_comes_apart_into_its_texts() -> None:
    texts = [_text("a", 6), _text("b", 6, first=100), _text("c", 3, first=200)]
    mixture = joined(texts)
    assert [one.ref for one in mixture.apart] == [text.ref for text in texts]
    for one, text in zip(mixture.apart, texts, strict=True):
        np.testing.assert_array_equal(one.input_ids, text.input_ids)
    assert mixture.parts == [text.part for text in texts]
    assert mixture.part.ids_sha256 not in {part.ids_sha256 for part in mixture.parts}
    assert mixture.part.mixture == mixture.parts


@pytest.mark.parametrize("chosen", [slice(0, 6), slice(2, 8), slice(0, None, 2)])
def test_every_part_of_a_mixture_has_alike_much_of_each(chosen: slice) -> None:
    part = joined([_text("a", 6), _text("b", 6, first=100)]).rows(chosen)
    assert [ref.samples for ref in part.parts] == [3, 3]
    assert [ref.tokens for ref in part.parts] == [12, 12]
    assert part.ref.samples == 6
    assert [ref.samples for ref in part.ref.texts] == [3, 3]


def test_a_text_that_has_no_sample_in_a_part_is_not_told() -> None:
    part = joined([_text("a", 2), _text("b", 2, first=100)]).rows(slice(0, 1))
    assert [ref.source for ref in part.parts] == ["a"]
    assert [ref.source for ref in part.ref.mixture] == ["a", "b"]


def test_a_single_text_is_its_only_part() -> None:
    text = _text("a", 2)
    assert joined([text]) is text
    assert text.parts == [text.part]
    assert text.ref.mixture == []
    assert text.ref.texts == [text.ref]
    assert text.part.ids_sha256 == text.ids_sha256
    assert text.part.model_copy(update={"ids_sha256": None}) == text.ref


def test_a_mixture_is_read_again_by_the_names_of_its_texts() -> None:
    names = [
        "pydoc (calibration half, Python 3.11)",
        "self (text sampled by the model, seed 3)",
        "a",
    ]
    texts = [_text(name, samples) for name, samples in zip(names, (6, 6, 2), strict=True)]
    ref = joined(texts).ref
    assert (specs_of(ref), samples_of(ref), seed_of_all(ref)) == (("pydoc", "self", "a"), 6, 3)
    ref = texts[2].ref
    assert (specs_of(ref), samples_of(ref), seed_of_all(ref)) == (("a",), 2, 0)
    ref = ref.model_copy(update={"samples": 0})  # of scores that read no text
    assert (specs_of(ref), samples_of(ref), seed_of_all(ref)) == ((), None, 0)

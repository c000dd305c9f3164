"""The word error rate and the interval of its difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from exporter.compare.encoder_decoder.answers import (
    Judged,
    Normalizer,
    judge_answers,
    normalizer_of,
    word_errors,
)
from exporter.compare.intervals import difference_interval
from exporter.errors import ComparisonError, MissingDependencyError
from exporter.models.decoding_rules import DecodingRules
from exporter.models.texts.paired import PairReader, paired_text
from exporter.models.texts.pairs import read_pairs
from tests.raising import raises

RIGHT = ["the cat sat", "on the mat, today"]
PLAIN = Normalizer("", str)


def test_an_interval_holds_the_difference_and_narrows_with_items() -> None:
    rng = np.random.default_rng(0)

    def width(items: int) -> float:
        words = rng.integers(5, 20, items).astype(np.float64)
        baseline = rng.binomial(words.astype(int), 0.1).astype(np.float64)
        candidate = rng.binomial(words.astype(int), 0.2).astype(np.float64)
        interval = difference_interval(baseline, candidate, words)
        low, high = interval.ci95
        assert low < interval.value < high
        assert interval.value == pytest.approx((candidate - baseline).sum() / words.sum())
        return high - low

    assert width(400) < width(20) / 2


@pytest.mark.parametrize(("items", "edits"), [(1, 0), (1, 2), (5, 0), (5, 1)])
def test_recordings_that_differ_alike_leave_as_much_doubt_as_they_are_few(
    items: int, edits: int
) -> None:
    words, none = np.full(items, 4.0), np.zeros(items)
    interval = difference_interval(none, none + edits, words)
    assert interval == difference_interval(none, none + edits / 4)
    assert interval.ci95[0] < 0 < interval.ci95[1]


def test_without_jiwer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with raises(MissingDependencyError, "", "speech"):
        word_errors(RIGHT, RIGHT, RIGHT, "r", PLAIN)


class Marks:
    """A tokenizer whose tokens are named, with Whisper's list of spellings."""

    english_spelling_normalizer: ClassVar[dict[str, str]] = {"colour": "color"}

    def __init__(self, *names: str) -> None:
        self._names = names

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self._names[number] for number in ids]


def normalizer(*names: str, model_type: str = "whisper") -> Normalizer:
    rules = DecodingRules(prompt=tuple(range(len(names))), end_ids=frozenset({0}), pad_id=0)
    config = {"model_type": model_type}
    return normalizer_of(PairReader("m", Path("m"), config, rules, Marks(*names)))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("marks", "right", "heard", "errors"),
    [
        ("en", "the cat sat on the mat, today", "The cat sat -- on the mat today.", 0),
        ("en", "twenty dollars", "$20", 0),
        ("en", "I can't say we're late", "i can not say we are late", 0),
        ("en", "It's the twenty first of May, Mr. Smith", "it is the 21st of may mister smith", 0),
        ("en", "a colour", "a color", 0),
        ("en", "um, nineteen ninety six", "1996", 0),
        ("en", "the cat sat", "the mat sat", 1 / 3),
        ("de translate", "twenty dollars", "$20", 0),
        ("", "twenty dollars", "$20", 0),
        ("de", "Schöne Grüße, bis morgen!", "schöne grüße bis morgen", 0),
        ("de", "zwanzig Euro", "20 euro", 1 / 2),
        ("ja", "\u732b\u304c\u3044\u308b", "\u732b\u304c\u3044\u305f", 1 / 4),
    ],
)
def test_what_says_the_same_counts_as_the_same(
    marks: str, right: str, heard: str, errors: float
) -> None:
    pytest.importorskip("jiwer")
    by = normalizer("<|startoftranscript|>", *(f"<|{mark}|>" for mark in marks.split()))
    task_result = word_errors([right], [right], [heard], "r", by)
    assert (task_result.baseline, task_result.candidate) == (0.0, pytest.approx(errors))
    assert task_result.difference.value == pytest.approx(errors)
    assert not task_result.higher_is_better
    assert by.name in task_result.source


@pytest.mark.torch
def test_a_model_that_names_no_language_has_the_basic_normaliser() -> None:
    assert normalizer("<s>", model_type="speech_to_text").apply("Twenty!").split() == ["twenty"]


@pytest.mark.torch
def test_words_where_nothing_was_said_are_edits() -> None:
    pytest.importorskip("jiwer")
    by = normalizer("<|startoftranscript|>")
    task_result = word_errors(["", "one two"], ["", "one two"], ["uh oh", "one two"], "r", by)
    assert task_result.baseline == 0
    assert task_result.candidate == 1
    with raises(ComparisonError, "no-words", "r"):
        word_errors(["?!"], ["a"], ["a"], "r", by)


class Arm:
    """Answers as it is asked to, and remembers how long it may."""

    def __init__(self) -> None:
        self.most: list[int] = []

    def encode(self, source: Any) -> None: ...

    def step(self, _state: None, tokens: Any) -> tuple[Any, None]:
        return np.zeros((1, tokens.shape[1], 8), np.float32), None

    def answer(self, _state: None, rules: DecodingRules, most: int) -> Any:
        self.most.append(most)
        return np.array([[*rules.prompt, 5]])


def speech_reader(**sizes: int) -> PairReader:
    config = {"max_target_positions": 448, "vocab_size": 8, **sizes}
    rules = DecodingRules(prompt=(1, 2), end_ids=frozenset({0}), pad_id=0)
    return PairReader("m", Path("m"), config, rules, None)


def hashes(*pairs: tuple[str, str | None], file: Path) -> tuple[str, str]:
    """Of the sources, and of what a report says was asked."""
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    file.write_text("\n".join(lines))
    read = read_pairs(str(file), part="evaluation", sound=False)
    noise = read_pairs("random", part="evaluation", sound=True)
    text = paired_text(speech_reader(), noise, lambda _: np.array([[1, 2, 5, 6]]), number=1)
    arms: dict[str, Any] = {"baseline": Arm(), "candidate": Arm()}
    pairs_alone = replace(read, pairs=())  # what is asked of these arms doesn't matter
    accuracy = judge_answers(arms, Judged(speech_reader(), pairs_alone, text))
    return read.sha256, accuracy.text_sha256


def test_the_same_question_is_the_same_sources_with_the_same_targets_in_order(
    tmp_path: Path,
) -> None:
    file = tmp_path / "pairs.jsonl"
    result = hashes(("a", "x"), ("b", "y"), file=file)
    assert hashes(("a", "x"), ("b", "y"), file=tmp_path / "again.jsonl") == result
    for other in (
        hashes(("a", "x"), ("b", "z"), file=file),
        hashes(("b", "y"), ("a", "x"), file=file),
        hashes(("a", None), ("b", None), file=file),
    ):
        assert other[0] == result[0]
        assert other[1] != result[1]


@pytest.mark.parametrize(
    ("sizes", "most"), [({"num_mel_bins": 2, "max_source_positions": 3}, 446), ({}, 126)]
)
def test_answers_of_speech_may_take_all_of_the_decoder(sizes: dict[str, int], most: int) -> None:
    reader = speech_reader(**sizes)
    pairs = read_pairs("random", part="evaluation", sound=True)
    text = paired_text(reader, pairs, lambda _: np.array([[1, 2, 5, 6]]), number=1)
    arms: dict[str, Any] = {"baseline": Arm(), "candidate": Arm()}
    accuracy = judge_answers(arms, Judged(reader, pairs, text))
    assert [arm.most for arm in arms.values()] == [[most], [most]]
    assert accuracy.generation is not None
    assert accuracy.generation.new_tokens == most

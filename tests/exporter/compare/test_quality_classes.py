"""How near two classifiers' answers are, held against sums by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from exporter.artifacts.latency import Shape
from exporter.compare.answers import label_numbers, label_scores
from exporter.compare.encoder_quality import (
    class_log_probabilities,
    compare_classes,
    in_pairs,
)
from exporter.compare.kept import read_source
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.compare.tasks.items import compare_scores
from exporter.engines.inputs import make_inputs
from exporter.engines.tensors import TensorSpec
from exporter.errors import ComparisonError
from exporter.models.texts.images import Images
from tests.raising import raises

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(size=(rows, 3)) for rows in (1, 4, 2)]
OTHERS = [logit + RNG.normal(scale=0.5, size=logit.shape) for logit in LOGITS]


class Table:
    """Gives the logits of a text by its first token."""

    backend = "table"
    inputs = (TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence")),)

    def __init__(self, logits: Sequence[Any]) -> None:
        self._logits = logits

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        return {outputs[0]: self._logits[inputs["input_ids"][0, 0]][None]}


def said(logits: Sequence[Any], **told: Any) -> list[Any]:
    runner: Any = Table(logits)
    texts = [np.array([number, 0]) for number in range(len(logits))]
    return class_log_probabilities(runner, texts, arm="candidate", **told)


def test_divergence_and_agreement_over_the_rows_of_all_texts() -> None:
    first, second = said(LOGITS), said(OTHERS)
    assert first[1] == pytest.approx(log_softmax(LOGITS[1], axis=1))
    accuracy = compare_classes(first, second, source="made", sha256="0")
    whole, cut = np.concatenate(LOGITS), np.concatenate(OTHERS)
    kl = rel_entr(softmax(whole, axis=1), softmax(cut, axis=1)).sum(1)
    assert accuracy.kl_divergence == pytest.approx(kl.mean())
    assert accuracy.top1_agreement == pytest.approx((whole.argmax(1) == cut.argmax(1)).mean())
    assert accuracy.tokens == 7
    assert accuracy.kl_interval is not None
    assert accuracy.kl_interval.ci95[0] <= accuracy.kl_divergence <= accuracy.kl_interval.ci95[1]


def test_a_single_logit_is_that_of_a_yes() -> None:
    [result] = said([np.array([[2.0]])])
    assert np.exp(result[0]) == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])


@pytest.mark.parametrize("bias", [0.0, -50.0])
def test_rerankers_are_compared_by_the_order_of_texts(bias: float) -> None:
    first, second = ([np.array([[z + bias]]) for z in row] for row in ([1, 3, 2], [2, 1, 5]))
    before, after = in_pairs(said(first)), in_pairs(said(second))
    yes = [np.exp(rows[0, 1]) for rows in before]
    assert yes == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-1))])  # 1 - 3, 2 - 1
    accuracy = compare_classes(before, after, source="made", sha256="0")
    assert (accuracy.tokens, accuracy.top1_agreement) == (2, 0.5)
    assert len(in_pairs(said(first[:1]))) == 1


def test_separate_labels_are_compared_one_by_one() -> None:
    [result] = said([np.array([[2.0, -1.0, 0.5]])], separate=True)
    assert np.exp(result[:, 1]) == pytest.approx(1 / (1 + np.exp([-2.0, 1.0, -0.5])))


def test_the_same_answers_differ_by_nothing() -> None:
    accuracy = compare_classes(said(LOGITS), said(LOGITS), source="made", sha256="0")
    assert (accuracy.kl_divergence, accuracy.top1_agreement) == (0, 1)


def test_answers_that_can_t_be_compared() -> None:
    wider = [np.pad(logit, ((0, 0), (0, 1))) for logit in LOGITS]
    for other in (said(wider), said(LOGITS[:2])):
        with raises(ComparisonError, "other-classes", 3):
            compare_classes(said(LOGITS), other, source="made", sha256="0")
    with raises(ComparisonError, "other-classes"):
        compare_classes([], [], source="made", sha256="0")
    with raises(ComparisonError, "not-finite", "candidate", 1):
        said([LOGITS[0], np.full((2, 3), np.nan)])


NAMES = {"0": "tench, Tinca tinca", "1": "great white shark, man-eater", "2": "cat"}


def log_probabilities(number: int, classes: int) -> list[Any]:
    logits = RNG.normal(size=(number, 1, classes))
    return [*(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))]


def test_shares_of_right_images_among_one_and_five() -> None:
    said = log_probabilities(40, 9)
    right = RNG.integers(0, 9, 40)
    scores = label_scores(said, right, "made")
    ranks = [sorted(-row[0]).index(-row[0][label]) for row, label in zip(said, right, strict=True)]
    assert scores.metrics["top1"].mean() == pytest.approx(np.mean([rank < 1 for rank in ranks]))
    assert scores.metrics["top5"].mean() == pytest.approx(np.mean([rank < 5 for rank in ranks]))


def test_five_of_five_classes_tell_nothing() -> None:
    scores = label_scores(log_probabilities(3, 5), np.zeros(3, np.int64), "made")
    assert set(scores.metrics) == {"top1"}


def test_a_class_that_the_head_lacks_is_refused() -> None:
    with raises(ComparisonError, "labels-mismatch", 6, 5):
        label_scores(log_probabilities(3, 5), np.array([0, 6, 1]), "made")


def test_the_difference_is_paired() -> None:
    said, right = log_probabilities(40, 9), RNG.integers(0, 9, 40)
    one = label_scores(said, right, "made")
    [top1, top5] = compare_scores(one, one)
    assert top1.difference.value == top5.difference.value == 0
    assert top1.only_baseline_right == top1.only_candidate_right == 0
    other = label_scores(log_probabilities(40, 9), right, "made")
    [top1, _] = compare_scores(one, other)
    assert top1.difference.value == pytest.approx(top1.candidate - top1.baseline)
    assert top1.difference.ci95[0] < top1.difference.value < top1.difference.ci95[1]


def test_the_five_likeliest_classes_are_held_against_each_other() -> None:
    first, second = log_probabilities(6, 8), log_probabilities(6, 8)
    accuracy = compare_classes(first, second, source="made", sha256="0")
    fives = [[set(np.argsort(-row[0])[:5]) for row in arm] for arm in (first, second)]
    shared = [len(one & two) / 5 for one, two in zip(*fives, strict=True)]
    assert accuracy.top5_agreement == pytest.approx(np.mean(shared))
    few = compare_classes([item[:, :5] for item in first], [item[:, :5] for item in second],
                          source="made", sha256="0")  # fmt: skip
    assert few.top5_agreement is None


@pytest.mark.parametrize(
    ("label", "number"),
    [("cat", 2), ("2", 2), ("tench", 0), ("tench, Tinca tinca", 0), ("great white shark", 1)],
)
def test_labels_are_names_numbers_or_the_first_of_several_names(label: str, number: int) -> None:
    assert label_numbers({"id2label": NAMES})[label] == number


@pytest.mark.parametrize("label", ["dog", "3", "-1", "man-eater", ""])
def test_other_labels_are_none(label: str) -> None:
    assert label not in label_numbers({"id2label": NAMES})


def test_a_name_of_two_classes_counts_for_neither_and_their_numbers_do() -> None:
    numbers = label_numbers({"id2label": {"1": "crane, bird", "2": "crane, machine"}})
    assert "crane" not in numbers
    assert numbers["crane, machine"] == 2
    numbers = label_numbers({"id2label": {"134": "crane", "517": "crane", "2": "cat"}})
    assert "crane" not in numbers
    assert (numbers["134"], numbers["517"], numbers["cat"]) == (134, 517, 2)


@pytest.mark.parametrize("told", [None, ["cat"], "cat", {"LABEL_0": "cat"}, {"-1": "cat"}])
def test_what_names_no_classes_by_number_gives_none(told: Any) -> None:
    assert label_numbers({"id2label": told}) == {}


def test_the_usual_text_stands_for_noise() -> None:
    source = read_source("pydoc", part="evaluation", images=True)
    assert isinstance(source, Images)
    assert source.is_random
    assert not isinstance(read_source("pydoc", part="evaluation", images=False), Images)


def test_images_have_no_second_text(tmp_path: Path) -> None:
    config = '{"architectures": ["ViTForImageClassification"]}'
    (tmp_path / "config.json").write_text(config)
    options = CompareOptions(other_text="docstrings")
    with raises(ComparisonError, "no-perplexity", "--other-text"):
        compare(tmp_path, tmp_path, options)


def test_images_of_no_fixed_size_can_not_be_made() -> None:
    sizes: list[tuple[Any, ...]] = [("batch", 3, 4, 4), ("batch", 3, "height", "width")]
    fixed, free = (TensorSpec("pixel_values", np.dtype(np.float32), size) for size in sizes)
    ids = np.zeros((2, 1), np.int64)
    assert make_inputs([fixed], Shape("encode", 2, 1), ids)["pixel_values"].shape == (2, 3, 4, 4)
    with raises(ComparisonError, "unknown-input", "pixel_values"):
        make_inputs([free], Shape("encode", 2, 1), ids)

"""How near two classifiers' answers are, held against sums by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from exporter.compare.encoder_quality import (
    class_log_probabilities,
    compare_classes,
    in_pairs,
)
from exporter.engines.tensors import TensorSpec
from exporter.errors import ComparisonError
from tests.raising import raises

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(size=(rows, 3)) for rows in (1, 4, 2)]
OTHERS = [each + RNG.normal(scale=0.5, size=each.shape) for each in LOGITS]


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
    found = compare_classes(first, second, source="made", sha256="0")
    whole, cut = np.concatenate(LOGITS), np.concatenate(OTHERS)
    kl = rel_entr(softmax(whole, axis=1), softmax(cut, axis=1)).sum(1)
    assert found.kl_divergence == pytest.approx(kl.mean())
    assert found.top1_agreement == pytest.approx((whole.argmax(1) == cut.argmax(1)).mean())
    assert found.tokens == 7
    assert found.kl_interval is not None
    assert found.kl_interval.ci95[0] <= found.kl_divergence <= found.kl_interval.ci95[1]


def test_a_single_logit_is_that_of_a_yes() -> None:
    [found] = said([np.array([[2.0]])])
    assert np.exp(found[0]) == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])


@pytest.mark.parametrize("bias", [0.0, -50.0])
def test_rerankers_are_compared_by_the_order_of_texts(bias: float) -> None:
    first, second = ([np.array([[z + bias]]) for z in row] for row in ([1, 3, 2], [2, 1, 5]))
    before, after = in_pairs(said(first)), in_pairs(said(second))
    yes = [np.exp(rows[0, 1]) for rows in before]
    assert yes == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-1))])  # 1 - 3, 2 - 1
    found = compare_classes(before, after, source="made", sha256="0")
    assert (found.tokens, found.top1_agreement) == (2, 0.5)
    assert len(in_pairs(said(first[:1]))) == 1


def test_separate_labels_are_compared_one_by_one() -> None:
    [found] = said([np.array([[2.0, -1.0, 0.5]])], separate=True)
    assert np.exp(found[:, 1]) == pytest.approx(1 / (1 + np.exp([-2.0, 1.0, -0.5])))


def test_the_same_answers_differ_by_nothing() -> None:
    found = compare_classes(said(LOGITS), said(LOGITS), source="made", sha256="0")
    assert (found.kl_divergence, found.top1_agreement) == (0, 1)


def test_answers_that_can_t_be_compared() -> None:
    wider = [np.pad(each, ((0, 0), (0, 1))) for each in LOGITS]
    for other in (said(wider), said(LOGITS[:2])):
        with raises(ComparisonError, "other-classes", 3):
            compare_classes(said(LOGITS), other, source="made", sha256="0")
    with raises(ComparisonError, "other-classes"):
        compare_classes([], [], source="made", sha256="0")
    with raises(ComparisonError, "not-finite", "candidate", 1):
        said([LOGITS[0], np.full((2, 3), np.nan)])

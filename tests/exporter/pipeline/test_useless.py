"""A cut that ruins the model ends an export, unless it is asked for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.artifacts import CalibrationRef, PlannedDeletion, PruningPlan
from exporter.choose.budgets.budget import USUAL_REQUEST, Budget, Floors, Memory
from exporter.errors import UnmetGoalError
from exporter.pipeline.refusals import USELESS_COSINE, refuse_useless
from tests.raising import raises


def run(
    rise: float | None,
    budget: Budget | None = None,
    refuses: bool = True,
    given: bool = False,
    figure: str = "log_perplexity_increase",
) -> Any:
    deletions = [PlannedDeletion(layer=n, kind="attention", replacement="none") for n in range(8)]
    figures = {} if rise is None else {figure: rise}
    plan = PruningPlan(deletions=deletions, predicted=figures)
    drops = SimpleNamespace(budget=None if given else budget or Budget(attention=8))
    request = SimpleNamespace(drops=drops, refuses_useless=refuses)
    return SimpleNamespace(request=request, plan=SimpleNamespace(plan=plan))


def test_twice_the_perplexity_is_refused_with_the_number_that_may_do() -> None:
    with raises(UnmetGoalError, "useless", "--drop-attn 5", "--allow-damage"):
        refuse_useless(run(1.6 * math.log(2)))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(target_speedup=1.2, at=USUAL_REQUEST), "--faster 1.10x"),
        (Budget(parameters=0.1), "--parameters 5.0%"),
        (Budget(fits=Memory(10**6)), "--allow-damage"),
    ],
)
def test_a_goal_that_ruins_the_model_is_refused_with_the_goal_that_may_do(
    budget: Budget, words: str
) -> None:
    with raises(UnmetGoalError, "useless", words):
        refuse_useless(run(2 * math.log(2), budget))


def test_so_is_an_encoder_whose_embeddings_are_others() -> None:
    with raises(UnmetGoalError, "useless", "--drop-attn 4", "0.600", USELESS_COSINE):
        refuse_useless(run(0.6, figure="cosine"))
    refuse_useless(run(USELESS_COSINE + 0.01, figure="cosine"))
    refuse_useless(run(0.6, refuses=False, figure="cosine"))


class _ForSequenceClassification:
    config: Any


def of_classes(same: float, texts: int, labels: int = 3, **more: Any) -> Any:
    result = run(same, figure="top1_agreement", **more)
    judged = CalibrationRef(
        source="made", samples=texts, sequence_length=8, tokens=8 * texts, sha256="0"
    )
    plan = result.plan.plan.model_copy(update={"judged_on": [judged]})
    model = _ForSequenceClassification()
    model.config = SimpleNamespace(num_labels=labels)
    return SimpleNamespace(
        request=result.request,
        plan=SimpleNamespace(plan=plan),
        choosing=SimpleNamespace(model=model),
    )


def test_so_is_a_classifier_whose_texts_get_other_classes_if_enough_texts_show_it() -> None:
    with raises(UnmetGoalError, "useless", "--drop-attn 4", "60%", "made"):
        refuse_useless(of_classes(0.6, 100))
    refuse_useless(of_classes(0.6, 6))
    refuse_useless(of_classes(0.82, 100))
    refuse_useless(of_classes(0.6, 100, refuses=False))


@pytest.mark.parametrize("texts", [24, 27])
def test_of_a_reranker_half_as_many_orders_show_it(texts: int) -> None:
    with raises(UnmetGoalError, "useless"):
        refuse_useless(of_classes(0.5, texts))
    refuse_useless(of_classes(0.5, texts, labels=1))
    with raises(UnmetGoalError, "useless"):
        refuse_useless(of_classes(0.5, 100, labels=1))


@pytest.mark.parametrize(
    "asked",
    [
        run(0.99 * math.log(2)),
        run(5.0, refuses=False),
        run(5.0, Budget(floors=Floors(100.0))),
        run(5.0, given=True),
        run(None),
    ],
)
def test_what_is_useful_or_asked_for_goes_on(asked: Any) -> None:
    refuse_useless(asked)

"""What is said of healed cuts that are held against limits, and of those that none keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion, TriedCut
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.limits import (
    BETTER_ENDS,
    ENDS,
    HIGH,
    LOW,
    SAME,
    QualityLimits,
    held_figures,
    rung_of,
)
from exporter.choose.budgets.trial_runs import refuse_all
from exporter.errors import UndecidedGoalError, UnmetGoalError
from exporter.models.ablation.damage import SIMILARITY, Damage
from graph_passes.types import Replacement
from tests.raising import raises


def tried_cut(
    healed: dict[str, float],
    *replacements: Replacement,
    healed_by: str = "fold",
    changed_weights: int | None = None,
) -> TriedCut:
    """A cut of one MLP for each replacement that doesn't hold."""
    deletions = [
        PlannedDeletion(layer=layer, kind="mlp", replacement=replacement)
        for layer, replacement in enumerate(replacements or ("none",))
    ]
    return TriedCut(
        deletions=deletions, healed_by=healed_by, changed_weights=changed_weights,
        training_seconds=0.0, bare=healed, healed=healed, holds=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("healed", "floors", "told", "untold"),
    [
        ({"top1_agreement": 0.9, SAME: 0.8316}, Floors(top1_agreement=0.9),
         "--min-top1-agreement 0.831", "--at-most"),
        ({"cosine": 0.99, LOW: 0.9899, SIMILARITY: 0.95, ENDS[SIMILARITY]: 0.9399},
         Floors(embedding_cosine=0.3, similarity=0.999), "--min-similarity 0.939",
         "--min-embedding-cosine"),
        ({"log_perplexity_increase": 0.01, HIGH: math.log1p(0.02041), "top1_agreement": 0.9},
         Floors(0.02, 0.8), "--at-most 2.1%", "--min-top1-agreement"),
        ({"log_perplexity_increase": 0.01, HIGH: math.log1p(0.01), "top1_agreement": 0.7},
         Floors(0.02, 0.8), "--min-top1-agreement 0.7", "--at-most"),
        ({"cosine": -0.5, LOW: -0.6}, Floors(embedding_cosine=0.3), "", "--min-embedding-cosine"),
    ],
)  # fmt: skip
def test_the_limits_that_would_allow_a_cut_are_named_and_would(
    healed: dict[str, float], floors: Floors, told: str, untold: str
) -> None:
    with pytest.raises(UnmetGoalError) as refused:
        refuse_all([tried_cut(healed)], QualityLimits(floors))
    hint = refused.value.hint
    assert told in hint
    assert untold not in hint


def test_what_is_not_shown_is_no_answer() -> None:
    def tried(rise: float, high: float, number: int = 1, low: float = 0.04) -> TriedCut:
        healed = {"log_perplexity_increase": rise, HIGH: high, "top1_agreement": 0.9}
        healed[BETTER_ENDS["log_perplexity_increase"]] = low
        return tried_cut(healed, *["none"] * number)

    limit = QualityLimits(Floors(0.02))
    with raises(UnmetGoalError, "nothing-within-limits", "mlp 0"):
        refuse_all([tried(0.05, 0.06), tried(0.1, 0.2, 2)], limit)
    with raises(UnmetGoalError, "nothing-within-limits", "mlp 0", "1.020"):
        cuts = [tried(0.1, 0.2, 2), tried(0.05, 0.06)]
        refuse_all(cuts, limit, gained=["a speedup of 1.050", "a speedup of 1.020"])
    undecided = [
        ([tried(0.015, 0.03, low=0.0)], False),
        ([tried(0.0201, 0.03, low=0.01)], False),  # nor is that a cut that costs too much
        ([tried(0.05, 0.06), tried(0.1, 0.2, 2, low=0.01)], False),
        ([tried(0.05, 0.06)], True),
    ]
    for cuts, smaller in undecided:
        with raises(UndecidedGoalError, "undecided-nothing-within-limits"):
            refuse_all(cuts, limit, smaller=smaller)


def test_both_limits_of_a_language_model_are_named() -> None:
    figures = {"log_perplexity_increase": 0.003, "top1_agreement": 0.95, SAME: 0.94}
    for floors, named in [
        (Floors(None, 0.99), ["99.0%"]),
        (Floors(0.02, 0.99), ["2.0%", "99.0%"]),
        (Floors(0.02), ["2.0%"]),
    ]:
        outcome = QualityLimits(floors).outcome(figures)
        assert all(text in outcome for text in named)
        assert ("99.0%" in outcome) == ("99.0%" in named)


@pytest.mark.parametrize("rise", [math.inf, math.nan])
def test_a_loss_without_bounds_is_shown_to_break_the_limit(rise: float) -> None:
    ones, sums = np.ones(4), np.array([1.0, 2.0, rise, 1.0])
    damage = Damage(ones, 0.1 * ones, ones, nll_sums=sums, baseline_nll_sums=ones)
    assert rung_of(0, held_figures(damage), Floors(0.02)).is_beyond


def test_a_figure_of_a_single_sample_says_that_it_has_no_interval() -> None:
    figures = {"top1_agreement": 0.95}
    limits = QualityLimits(Floors(top1_agreement=0.99))
    assert "interval" in limits.outcome(figures)
    assert limits.outcome(figures) != limits.outcome(figures | {SAME: 0.95})

"""What is said of budgets that can't be held: what can be reached instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.candidates import PlanCandidate, QualityCheck
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.budgets.units import Goal
from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.table import CostTable
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import PlanError, UndecidedGoalError, UnmetGoalError, UsageError
from exporter.options import is_given
from graph_passes.types import BLOCK_KINDS


def refuse_more_than_scores(budget: Budget, search: SearchOptions) -> None:
    """Refuses what an encoder-decoder can't be planned by: more than numbers, other searches."""
    others = budget.keep_first, budget.at
    if not budget.only_counts or any(others) or budget.kinds != BLOCK_KINDS:
        raise PlanError(
            "Encoder-decoders are planned by numbers of sublayers alone.",
            "Say how many: --drop-attn, --drop-cross, --drop-mlp, --drop-block or --drop-joint.",
            code="numbers-only",
        )
    if is_given(search, "tokens"):
        raise PlanError(
            "Encoder-decoders are planned on all pairs that the scores rest on, not on a number of "
            "their tokens.",
            "Leave --search-tokens out; --samples says how many pairs there are.",
            code="other-search",
        )
    if search.kept_small not in ("kl", "perplexity"):
        raise PlanError(
            "Encoder-decoders are planned by their answers to pairs of texts, not by --objective "
            f"{search.kept_small}.",
            "Take kl or perplexity.",
            code="other-objective",
        )


def refuse_goal(goal: Goal, most: float, cause: Exception | None = None) -> NoReturn:
    """Refuses a goal that even dropping everything that may be dropped doesn't reach."""
    raise UnmetGoalError(
        "The budget is out of reach: dropping everything that may be dropped gives "
        f"{goal.unit.words(most)}; the budget is {goal.words()}.",
        "Ask for less, or let more be dropped: more kinds, fewer protected, no replacements.",
        code="out-of-reach",
    ) from cause


def refuse_floors(
    checker: QualityCheck, candidate: PlanCandidate, goals: Sequence[Goal], nearest: PlanCandidate
) -> NoReturn:
    """Refuses goals that cost more than the floors allow."""
    wanted = " and ".join(goal.words() for goal in goals)
    kind, undecided = _kind(checker, candidate)
    raise kind(
        f"The budget can't be met: with {wanted}, " + checker.outcome(candidate) + ".",
        f"Within the limits on quality, this is possible: {gains_of(nearest, goals)} "
        f"({checker.damage(nearest).words}). Ask for that, allow more damage, let more "
        "be dropped or replaced (--heal best), or score on more text, which makes the "
        "intervals narrower.",
        code=f"{undecided}beyond-floors",
    )


def refuse_nothing(checker: QualityCheck, candidate: PlanCandidate) -> NoReturn:
    """Refuses floors that not even the smallest cut keeps."""
    if not candidate.options:
        raise PlanError(
            "Nothing can be dropped: no sublayer that may be dropped gains anything.",
            "Protect fewer sublayers, allow more --kinds, or smaller replacements: --heal best.",
            code="nothing-to-drop",
        )
    kind, undecided = _kind(checker, candidate)
    raise kind(
        f"Nothing can be dropped within the limits on quality: with {candidate.options[0]} alone, "
        + checker.outcome(candidate)
        + ".",
        f"The nearest plan costs: {checker.damage(candidate).words}. Allow more, take "
        "--heal best, or score on more text, which makes the intervals narrower.",
        code=f"{undecided}nothing-within-floors",
    )


def _kind(checker: QualityCheck, candidate: PlanCandidate) -> tuple[type[UnmetGoalError], str]:
    """By whether a cut is shown to break the floors, and what its code begins with."""
    if checker.rung_with(checker.damage(candidate)).is_beyond:
        return UnmetGoalError, ""
    return UndecidedGoalError, "undecided-"


def gains_of(candidate: PlanCandidate, goals: Sequence[Goal]) -> str:
    """What a candidate reaches, in the goals' words."""
    return " and ".join(goal.unit.words(candidate.gain(goal.unit)) for goal in goals)


def refuse_missing(
    budget: Budget, sizes: GraphSizes | None, stopwatch: Stopwatch | None, costs: CostTable | None
) -> None:
    """Refuses a budget for which something isn't given: a graph, or costs of the same request."""
    if budget.at is not None and stopwatch is None and costs is None:
        raise UsageError(
            "Times are measured on the exported graph.",
            "Give it with --onnx, or give earlier measured costs with --costs.",
            code="times-need-graph",
        )
    if budget.fits is not None:
        if sizes is None:
            raise UsageError(
                "The size of the caches is read from the exported graph.",
                "Name it with --onnx.",
                code="caches-need-graph",
            )
        sizes.total_bytes(context=budget.fits.context, batch=budget.fits.batch)
    if costs is not None and budget.at is not None and costs.at != budget.at:
        raise UsageError(
            f"The costs were measured for {costs.at}, not for {budget.at}.",
            "Ask for that request with --at, or measure again.",
            code="other-conditions",
        )

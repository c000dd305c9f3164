"""From a budget to goals in units that add up over sublayers."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.gains import (
    Bytes,
    Costs,
    Counted,
    CountedBlocks,
    Goal,
    Milliseconds,
    Parameters,
    Unit,
)
from exporter.choose.costs import GraphSizes
from exporter.errors import PlanError


def goals_of(
    budget: Budget, sizes: GraphSizes, costs: Costs | None, rank: int | None
) -> list[Goal]:
    """What has to go, the target speedup first.

    Args:
        budget: What was asked for.
        sizes: Of the sublayers.
        costs: Their times; None where no speedup is asked for.
        rank: Of linear maps.

    Raises:
        PlanError: The model fits its memory as it is, and nothing else is asked for.
    """
    goals = [*_speed(budget, costs), *_sizes(budget, sizes, rank), *_counts(budget)]
    if not goals and budget.fits is not None and not budget.floors:
        whole = Bytes(sizes, budget.fits, rank).words(0)
        raise PlanError(
            f"Nothing needs to be dropped: the model has {whole} as it is.",
            "Ask for less memory, a longer --context or more --sequences.",
        )
    return goals


def unit_to_use_up(
    budget: Budget, sizes: GraphSizes, costs: Costs | None, rank: int | None
) -> Unit:
    """What floors are used up for: a request's time where one is named, else parameters."""
    if costs is not None and budget.at is not None:
        return Milliseconds(costs)
    return Parameters(sizes, rank)


def _speed(budget: Budget, costs: Costs | None) -> Iterator[Goal]:
    if budget.target_speedup is not None and costs is not None:
        yield Goal(Milliseconds(costs), costs.baseline_ms * (1 - 1 / budget.target_speedup))


def _sizes(budget: Budget, sizes: GraphSizes, rank: int | None) -> Iterator[Goal]:
    if budget.parameters is not None:
        parameters = Parameters(sizes, rank)
        yield Goal(parameters, budget.parameters * parameters.whole)
    if budget.fits is not None:
        held = Bytes(sizes, budget.fits, rank)
        if held.whole > budget.fits.limit_bytes:
            yield Goal(held, held.whole - budget.fits.limit_bytes)


def _counts(budget: Budget) -> Iterator[Goal]:
    if budget.attention:
        yield Goal(Counted(("attention",), "attention"), budget.attention)
    if budget.mlp:
        yield Goal(Counted(("mlp",), "MLP"), budget.mlp)
    if budget.block:
        yield Goal(CountedBlocks(), budget.block)
    if budget.joint:
        yield Goal(Counted(budget.kinds, "sublayer"), budget.joint)

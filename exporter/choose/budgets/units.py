"""The units of a budget, in which gains add up, and its goals: how much of each is to go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from exporter.choose.budgets.budget import USUAL_CONTEXT, USUAL_REQUEST, Budget, Memory
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.weighing import GraphSizes
from exporter.errors import PlanError
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerKind, SublayerRef


@dataclass(frozen=True, eq=False)
class Unit:
    """Something that every sublayer has a part of.

    ``gain`` is what goes with a sublayer or block, less what its replacement brings; ``words`` says
    a gain as a user does.
    """

    gain: Callable[[Sequence[SublayerRef], Replacement], float]
    words: Callable[[float], str]
    is_blocks: bool = False


@dataclass(frozen=True)
class Goal:
    """So much of a unit is to go."""

    unit: Unit
    amount: float


def words_of(goals: Iterable[Goal], gain: Callable[[Unit], float] | None = None) -> str:
    """The goals as a user says them, or what is gained of each."""
    return " and ".join(g.unit.words(g.amount if gain is None else gain(g.unit)) for g in goals)


def numbers_of(kinds: Sequence[SublayerKind], label: str) -> Unit:
    """One for every sublayer of some kinds, or without any for every block."""

    def gain(names: Sequence[SublayerRef], _: Replacement) -> float:
        if not kinds:
            return float(len(names) > 1)
        return float(len(names) == 1 and names[0][1] in kinds)

    return Unit(gain, lambda number: f"{counted(number, label)} dropped", not kinds)


def parameters_of(sizes: GraphSizes) -> Unit:
    """Weights, counted."""
    return Unit(
        lambda names, how: float(sum(sizes.saved_parameters(name, how) for name in names)),
        lambda gain: f"{100 * gain / sizes.parameters:.1f} % of the parameters removed",
    )


def bytes_of(sizes: GraphSizes, memory: Memory) -> Unit:
    """Weights and caches, in bytes; its words say what is left, since that is what has to fit."""
    context, batch = memory.context, memory.batch
    whole = sizes.total_bytes(context=context, batch=batch)
    saved = partial(sizes.saved_bytes, context=context, batch=batch)
    return Unit(
        lambda names, how: float(sum(saved(name, how) for name in names)),
        lambda gain: f"{(whole - gain) / 1e9:.4g} GB of weights and caches",
    )


def time_of(costs: CostTable) -> Unit:
    """A request's milliseconds."""
    whole = costs.baseline_ms
    return Unit(
        lambda names, how: sum(costs.saved_ms(name, how) for name in names),
        lambda gain: f"a speedup of {whole / max(whole - gain, 1e-9 * whole):.3f}",
    )


def goals_of(budget: Budget, sizes: GraphSizes, costs: CostTable | None) -> list[Goal]:
    """What has to go, the target speedup first."""
    goals = []
    if budget.target_speedup is not None and costs is not None:
        goals.append(Goal(time_of(costs), costs.baseline_ms * (1 - 1 / budget.target_speedup)))
    if budget.parameters is not None:
        goals.append(Goal(parameters_of(sizes), budget.parameters * sizes.parameters))
    if budget.fits is not None:
        held = bytes_of(sizes, budget.fits)
        whole = sizes.total_bytes(context=budget.fits.context, batch=budget.fits.batch)
        if whole > budget.fits.limit_bytes:
            goals.append(Goal(held, whole - budget.fits.limit_bytes))
        elif not goals and not budget.counts and not budget.floors:
            raise PlanError(
                f"Nothing needs to be dropped: the model has {held.words(0)} as it is.",
                "Ask for less memory, a longer --context or more --sequences.",
                code="fits-already",
            )
    return goals + number_goals(budget)


def number_goals(budget: Budget) -> list[Goal]:
    """How many sublayers or blocks are to go."""
    units = {
        "attention": numbers_of(("attention",), "attention"),
        "cross_attention": numbers_of(("cross_attention",), "cross-attention"),
        "mlp": numbers_of(("mlp",), "MLP"),
        "block": numbers_of((), "block"),
        "joint": numbers_of((*budget.kinds, "cross_attention"), "sublayer"),
    }
    return [Goal(units[name], number) for name, number in budget.counts.items()]


def unit_to_use_up(budget: Budget, sizes: GraphSizes, costs: CostTable | None) -> Unit:
    """What floors are used up for: a request's time where one is named, else parameters."""
    return parameters_of(sizes) if costs is None or budget.at is None else time_of(costs)


def on_graph(budget: Budget, sizes: GraphSizes, progress: Progress = QUIET) -> Budget:
    """What is usual, as a graph allows it.

    The context of --fits is no longer than the model can hold, and the request is one that users
    send: an encoder decodes nothing, and may cut texts.
    """
    fits, shape = budget.fits, budget.at
    if fits is not None and fits.context == USUAL_CONTEXT:
        fits = replace(fits, context=min(USUAL_CONTEXT, sizes.longest or USUAL_CONTEXT))
        progress.say(f"plan: caches for a context of {fits.context} tokens are to fit")
    if shape is not None and shape == USUAL_REQUEST:
        known = (sizes.longest, sizes.longest_text, shape.longest)
        longest = min(limit for limit in known if limit is not None)
        new = min(shape.new, longest // 2) if sizes.has_cache else 0
        shape = replace(shape, prompt=min(shape.prompt, longest - new), new=new)
        progress.say(f"plan: the request that is timed is {shape} (--at)")
    return replace(budget, fits=fits, at=shape)

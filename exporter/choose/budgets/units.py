"""The units of a budget, in which gains add up, and its goals: how much of each is to go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from exporter.choose.budgets.budget import USUAL_CONTEXT, USUAL_REQUEST, Budget, Memory
from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.table import CostTable
from exporter.errors import PlanError
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerKind, SublayerRef


class Unit(Protocol):
    """Something that every sublayer has a part of."""

    @property
    def whole(self) -> float:
        """What the whole model has of it."""

    def gain(self, names: Sequence[SublayerRef], replacement: Replacement) -> float:
        """What goes with a sublayer or block, less what its replacement brings."""

    def words(self, gain: float) -> str:
        """A gain as a user says it."""


@dataclass(frozen=True)
class Goal:
    """So much of a unit is to go."""

    unit: Unit
    amount: float

    def words(self) -> str:
        """The goal as a user says it."""
        return self.unit.words(self.amount)


@dataclass(frozen=True)
class Counted:
    """One for every sublayer of some kinds, or for every block."""

    kinds: tuple[SublayerKind, ...]  # empty for blocks
    label: str

    @property
    def whole(self) -> float:
        """What is counted has no whole."""
        return math.inf

    def gain(self, names: Sequence[SublayerRef], replacement: Replacement) -> float:
        """1 for each sublayer of the kinds, or for both sublayers of a layer."""
        if not self.kinds:
            return float(len(names) == len(BLOCK_KINDS))
        return float(len(names) == 1 and names[0][1] in self.kinds)

    def words(self, gain: float) -> str:
        """``8 attentions dropped``."""
        return f"{counted(gain, self.label)} dropped"


@dataclass(frozen=True)
class Parameters:
    """Weights, counted."""

    sizes: GraphSizes

    @property
    def whole(self) -> float:
        """The model's parameters."""
        return float(self.sizes.parameters)

    def gain(self, names: Sequence[SublayerRef], replacement: Replacement) -> float:
        """Parameters that go."""
        own = (self.sizes.saved_parameters(name, replacement) for name in names)
        return float(sum(own))

    def words(self, gain: float) -> str:
        """``10.0 % of the parameters removed``."""
        return f"{100 * gain / self.whole:.1f} % of the parameters removed"


@dataclass(frozen=True)
class Bytes:
    """Weights and caches, in bytes."""

    sizes: GraphSizes
    memory: Memory

    @property
    def whole(self) -> float:
        """What the model takes."""
        context, batch = self.memory.context, self.memory.batch
        return float(self.sizes.total_bytes(context=context, batch=batch))

    def gain(self, names: Sequence[SublayerRef], replacement: Replacement) -> float:
        """Bytes that go."""
        context, batch = self.memory.context, self.memory.batch
        own = (
            self.sizes.saved_bytes(name, replacement, context=context, batch=batch)
            for name in names
        )
        return float(sum(own))

    def words(self, gain: float) -> str:
        """``7.9 GB of weights and caches``: what is left, since that is what has to fit."""
        return f"{(self.whole - gain) / 1e9:.4g} GB of weights and caches"


@dataclass(frozen=True)
class Milliseconds:
    """A request's time."""

    costs: CostTable

    @property
    def whole(self) -> float:
        """A request to the whole model, in ms."""
        return self.costs.baseline_ms

    def gain(self, names: Sequence[SublayerRef], replacement: Replacement) -> float:
        """Milliseconds that go."""
        return sum(self.costs.saved_ms(name, replacement) for name in names)

    def words(self, gain: float) -> str:
        """``a speedup of 1.25``."""
        return f"a speedup of {self.speedup(gain):.3f}"

    def speedup(self, gain: float) -> float:
        """How many times as fast a request is that takes ``gain`` ms less."""
        return self.whole / max(self.whole - gain, 1e-9 * self.whole)


def goals_of(budget: Budget, sizes: GraphSizes, costs: CostTable | None) -> list[Goal]:
    """What has to go, the target speedup first."""
    goals = []
    if budget.target_speedup is not None and costs is not None:
        goals.append(Goal(Milliseconds(costs), costs.baseline_ms * (1 - 1 / budget.target_speedup)))
    if budget.parameters is not None:
        parameters = Parameters(sizes)
        goals.append(Goal(parameters, budget.parameters * parameters.whole))
    if budget.fits is not None:
        held = Bytes(sizes, budget.fits)
        if held.whole > budget.fits.limit_bytes:
            goals.append(Goal(held, held.whole - budget.fits.limit_bytes))
        elif not goals and not budget.counts and not budget.floors:
            raise PlanError(
                f"Nothing needs to be dropped: the model has {held.words(0)} as it is.",
                "Ask for less memory, a longer --context or more --sequences.",
                code="fits-already",
            )
    units = {
        "attention": Counted(("attention",), "attention"),
        "mlp": Counted(("mlp",), "MLP"),
        "block": Counted((), "block"),
        "joint": Counted(budget.kinds, "sublayer"),
    }
    return goals + [Goal(units[name], n) for name, n in budget.counts.items() if name in units]


def unit_to_use_up(budget: Budget, sizes: GraphSizes, costs: CostTable | None) -> Unit:
    """What floors are used up for: a request's time where one is named, else parameters."""
    if costs is not None and budget.at is not None:
        return Milliseconds(costs)
    return Parameters(sizes)


def with_context(budget: Budget, sizes: GraphSizes | None, progress: Progress = QUIET) -> Budget:
    """The usual context of --fits is no longer than the model can hold."""
    longest = None if sizes is None else sizes.longest
    if budget.fits is None or budget.fits.context != USUAL_CONTEXT:
        return budget
    context = min(USUAL_CONTEXT, longest or USUAL_CONTEXT)
    progress.say(f"plan: caches for a context of {context} tokens are to fit")
    return replace(budget, fits=replace(budget.fits, context=context))


def with_request(budget: Budget, sizes: GraphSizes | None, progress: Progress = QUIET) -> Budget:
    """The usual request is one that users send: an encoder decodes nothing, and may cut texts."""
    shape = budget.at
    if shape is None or shape != USUAL_REQUEST or sizes is None:
        return budget
    known = (sizes.longest, sizes.longest_text)
    longest = min((limit for limit in known if limit is not None), default=shape.longest)
    new = min(shape.new, longest // 2) if sizes.has_cache else 0
    changed = replace(shape, prompt=min(shape.prompt, longest - new), new=new)
    progress.say(f"plan: the request that is timed is {changed} (--at)")
    return replace(budget, at=changed)

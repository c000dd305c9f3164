"""What is done to a model, step by step, and what it costs on tokens that the search never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import PlannedDeletion
from exporter.choose.budgets.budget import NO_FLOORS, Floors
from exporter.choose.budgets.gains import Unit
from exporter.choose.selection import Meter, Option, RememberingMeter, Step, chosen, cut_of_options
from exporter.compare.quality.intervals import mean_interval
from exporter.models.ablation import BranchReplacements, Damage
from graph_passes.types import Replacement, SublayerRef

_ABOUT = 0.9
"""An option that gains this share of another's gains about as much."""
_NOT_MEASURED = Damage(*(np.empty(0) for _ in range(5)))


@dataclass(frozen=True, eq=False)
class Walk:
    """What is done to a model: options in the order in which they were chosen."""

    options: tuple[Option, ...] = ()

    @property
    def cut(self) -> BranchReplacements:
        """What stands in the place of which branch."""
        return cut_of_options(self.options)

    @property
    def choices(self) -> dict[SublayerRef, Replacement]:
        """Each sublayer with what takes its place."""
        return {name: option.replacement for option in self.options for name in option.names}

    @property
    def deletions(self) -> list[PlannedDeletion]:
        """The same as a plan has it."""
        return [deletion for option in self.options for deletion in option.deletions()]

    def plus(self, steps: Iterable[Step]) -> Walk:
        """Some steps further; a step takes the place of earlier ones on the same sublayers."""
        return Walk(tuple(chosen([*map(as_step, self.options), *steps])))

    def without(self, option: Option) -> Walk:
        """One step less."""
        return Walk(tuple(other for other in self.options if other is not option))

    def gain(self, unit: Unit) -> float:
        """What goes with all of it."""
        return math.fsum(unit.gain(option.names, option.replacement) for option in self.options)


def as_step(option: Option) -> Step:
    """An option as a step of a search that hasn't measured it."""
    return Step(option, _NOT_MEASURED, 0.0)


def valued(
    options: Iterable[Option], unit: Unit, quality: Mapping[Option, float] | None = None
) -> list[Option]:
    """The options that gain something, with their gain in a unit.

    Args:
        options: All there are.
        unit: Of the gain.
        quality: Share of the branch's output that an option gives back. One that gives back less
            than another on the same sublayers, for about as much gain or less, is left out: each
            that is tried costs a run. Without, none is.
    """
    gains = {option: unit.gain(option.names, option.replacement) for option in options}
    rivals: dict[tuple[SublayerRef, ...], list[Option]] = {}
    for option in gains:
        rivals.setdefault(option.names, []).append(option)

    def is_beaten(option: Option) -> bool:
        return quality is not None and any(
            gains[other] >= _ABOUT * gains[option]
            and _guess(quality, other, gains) < _guess(quality, option, gains)
            for other in rivals[option.names]
        )

    return [
        replace(option, gain=gain)
        for option, gain in gains.items()
        if gain > 0 and not is_beaten(option)
    ]


def _guess(quality: Mapping[Option, float], option: Option, gains: Mapping[Option, float]) -> float:
    """Damage for the gain, by what of the branch is not given back."""
    lost = 1 - min(1.0, quality.get(option, 0.0))
    return lost / gains[option] if gains[option] > 0 else math.inf


class Judge:
    """Holds walks against floors, on tokens that the search doesn't see.

    A floor is kept where all of the 95 % interval over samples keeps it.

    Args:
        meter: Holds those tokens.
        floors: What must be kept.
    """

    def __init__(self, meter: Meter, floors: Floors = NO_FLOORS) -> None:
        self._meter = RememberingMeter(meter)
        self.floors = floors

    def damage(self, walk: Walk) -> Damage:
        """What a walk costs."""
        return self.damage_of(walk.cut)

    def damage_of(self, cut: BranchReplacements) -> Damage:
        """What a cut costs."""
        return self._meter.measure_many(cut, [])[0]

    def holds(self, walk: Walk) -> bool:
        """Whether a walk keeps the floors."""
        return not self.floors or not self.broken(walk)

    def broken(self, walk: Walk) -> list[str]:
        """The floors that a walk doesn't keep, in words."""
        return self.broken_by(self.damage(walk))

    def broken_by(self, damage: Damage) -> list[str]:
        """The floors that so much damage doesn't keep, in words."""
        floors = self.floors
        found = []
        most = _end(damage.nll_sums - damage.baseline_nll_sums, damage.positions, 1)
        if most > floors.log_perplexity_increase:
            found.append(
                f"the perplexity rises by {percent(damage.log_perplexity_increase)}, "
                f"95 % interval up to {percent(most)} "
                f"(allowed: {(floors.perplexity_increase or 0):.1%})"
            )
        least = _end(damage.agreements, damage.positions, 0)
        if floors.top1_agreement is not None and least < floors.top1_agreement:
            found.append(
                f"{damage.top1_agreement:.1%} of the likeliest tokens stay the same, "
                f"95 % interval down to {least:.1%} (at least: {floors.top1_agreement:.1%})"
            )
        return found


def _end(sums: NDArray[np.float64], counts: NDArray[np.float64], end: Literal[0, 1]) -> float:
    """The lower or upper end of a mean's 95 % interval; the mean where the samples give none."""
    interval = mean_interval(sums, counts)
    return float(sums.sum() / counts.sum()) if interval is None else interval.ci95[end]


def percent(log_increase: float) -> str:
    """A rise of a log as a share: ``4.9%``."""
    return f"{math.expm1(min(log_increase, 50.0)):.1%}"


def damage_words(damage: Damage) -> str:
    """What a walk costs, in a few words."""
    return (
        f"perplexity {math.expm1(min(damage.log_perplexity_increase, 50.0)):+.1%}, "
        f"KL divergence {damage.kl:.3f} nats, same top-1 token {damage.top1_agreement:.1%}"
    )

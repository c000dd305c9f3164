"""What may be done to sublayers, what is done to a model, and what that costs on unseen tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifacts import HealKind, ImportanceReport, PlannedDeletion
from exporter.artifacts.servers import Server, places_of
from exporter.choose.budgets.budget import NO_FLOORS, Budget, Floors
from exporter.choose.budgets.limits import QualityLimits, Rung, held_figures, rung_of
from exporter.choose.budgets.units import Unit
from exporter.choose.selection.meters import Meter, RememberingMeter
from exporter.choose.selection.options import Option, Step, cut_of_options, standing_options
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import AnyDamage, ClassDamage, Clusters
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.heal.fit import Fit

_REPLACEMENTS: dict[HealKind | None, tuple[Replacement, ...]] = {
    None: ("none",),
    "bias": ("bias",),
    "linear": ("linear",),
    "best": ("none", "bias", "linear"),
}


def replacements_of(heal: HealKind | None) -> tuple[Replacement, ...]:
    """What may take a branch's place."""
    return _REPLACEMENTS[heal]


@dataclass(frozen=True, eq=False)
class SublayerOptions:
    """All options, and what is guessed of them before anything is measured."""

    options: Sequence[Option]
    quality: Mapping[Option, float]
    prior: Mapping[SublayerRef, float]


def sublayer_options(
    report: ImportanceReport,
    budget: Budget,
    heal: HealKind | None,
    fits: Mapping[SublayerRef, Fit],
    protected: Collection[SublayerRef] = (),
    known: Collection[tuple[int, str]] | None = None,  # None: all
    without_map: Collection[tuple[int, str]] = (),
    server: Server | None = None,  # the runtime that has to hold what is chosen; None: any
) -> SublayerOptions:
    """Every sublayer (or block, where blocks are asked for) in every way allowed."""
    options = [
        _option(names, replacement, fits)
        for names in subjects(report.model.num_layers, budget)
        if not set(names) & set(protected)
        if known is None or set(names) <= set(known)
        for replacement in replacements_of(heal)
        if replacement != "linear" or not set(names) & set(without_map)
        if all(replacement in places_of(server, name) for name in names)
    ]
    quality = {option: _quality(option, fits) for option in options}
    best: dict[SublayerRef, float] = {}
    for option in options:
        for name in option.names:
            best[name] = max(best.get(name, 0.0), min(1.0, quality[option]))
    scores = {(score.layer, score.kind): score.score for score in report.scores}
    prior = {name: scores.get(name, 0.0) * (1 - given) for name, given in best.items()}
    return SublayerOptions(options, quality, prior)


def subjects(num_layers: int, budget: Budget) -> Iterator[tuple[SublayerRef, ...]]:
    """The sublayers, or the two of a block, that may go."""
    counts = (budget.attention, budget.mlp, budget.joint)
    others = (*counts, budget.parameters, budget.fits, budget.target_speedup)
    for layer in range(num_layers):
        if budget.block:
            yield tuple(SublayerRef(layer, kind) for kind in BLOCK_KINDS)
        if not budget.block or any(other for other in others):
            for kind in budget.kinds:
                yield (SublayerRef(layer, kind),)


def _option(
    names: tuple[SublayerRef, ...], replacement: Replacement, fits: Mapping[SublayerRef, Fit]
) -> Option:
    if replacement == "none":
        return Option(names)
    branch_replacements = {
        name: fits[name].bias if replacement == "bias" else fits[name].linear for name in names
    }
    return Option(names, replacement=replacement, branch_replacements=branch_replacements)


def _quality(option: Option, fits: Mapping[SublayerRef, Fit]) -> float:
    if option.replacement == "none":
        return 0.0
    kind = option.replacement
    own = [
        fits[name].bias_explained if kind == "bias" else fits[name].linear_explained
        for name in option.names
    ]
    return sum(own) / len(own)


_ABOUT = 0.9
"""An option that gains this share of another's gains about as much."""
_NOT_MEASURED = ClassDamage(*(np.empty(0) for _ in range(3)))


@dataclass(frozen=True, eq=False)
class PlanCandidate:
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

    def plus(self, steps: Iterable[Step]) -> PlanCandidate:
        """Some steps further; a step takes the place of earlier ones on the same sublayers."""
        return PlanCandidate(tuple(standing_options([*map(unmeasured_step, self.options), *steps])))

    def without(self, option: Option) -> PlanCandidate:
        """One step less."""
        return PlanCandidate(tuple(other for other in self.options if other is not option))

    def gain(self, unit: Unit) -> float:
        """What goes with all of it."""
        return math.fsum(unit.gain(option.names, option.replacement) for option in self.options)


def unmeasured_step(option: Option) -> Step:
    """An option as a step of a search that hasn't measured it."""
    return Step(option, _NOT_MEASURED, 0.0)


def with_gains(
    options: Iterable[Option], unit: Unit, quality: Mapping[Option, float] | None = None
) -> list[Option]:
    """The options that gain something, with their gain in a unit."""
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


class QualityCheck:
    """Holds candidates against floors, on tokens that the search doesn't see.

    A floor is kept where all of the 95 % interval over samples keeps it.
    """

    def __init__(
        self,
        meter: Meter,
        floors: Floors = NO_FLOORS,
        first: tuple[Meter, Clusters] | None = None,  # None: each cut is measured on all
        clusters: Clusters = None,
    ) -> None:
        self._meter = meter if isinstance(meter, RememberingMeter) else RememberingMeter(meter)
        self._first = None if first is None else (RememberingMeter(first[0]), first[1])
        self._clusters, self.floors = clusters, floors

    def damage(self, candidate: PlanCandidate) -> AnyDamage:
        """What a candidate costs."""
        return self.damage_of(candidate.cut)

    def damage_of(self, cut: BranchReplacements) -> AnyDamage:
        """What a cut costs."""
        return self._measured(self._meter, self._clusters, cut)

    def _measured(
        self, meter: RememberingMeter[AnyDamage], clusters: Clusters, cut: BranchReplacements
    ) -> AnyDamage:
        damage = meter.measure_many(cut, [])[0]
        return damage if clusters is None else damage.by_document(clusters)

    def holds(self, candidate: PlanCandidate) -> bool:
        """Whether a candidate keeps the floors."""
        return not self.floors or self.rung(candidate).holds

    def rung(self, candidate: PlanCandidate) -> Rung:
        """What of the floors a candidate uses up; of one that is clearly lost, on the first."""
        if self._first is not None:
            few = self.rung_with(self._measured(*self._first, candidate.cut))
            if few.is_beyond:
                return few
        return self.rung_with(self.damage(candidate))

    def rung_with(self, damage: AnyDamage) -> Rung:
        """What of the floors so much damage uses up."""
        return rung_of(0, held_figures(damage), self.floors)

    def outcome(self, candidate: PlanCandidate) -> str:
        """What a candidate costs, in words, beside the floors."""
        return QualityLimits(self.floors).outcome(held_figures(self.damage(candidate)))

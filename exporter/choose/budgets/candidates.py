"""What may be done to sublayers, what is done to a model, and what that costs on unseen tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import HealKind, ImportanceReport, PlannedDeletion
from exporter.artifacts.servers import Server, places_of
from exporter.choose.budgets.budget import NO_FLOORS, Budget, Floors
from exporter.choose.budgets.units import Unit
from exporter.choose.selection.meters import Meter, RememberingMeter
from exporter.choose.selection.options import Option, Step, cut_of_options, standing_options
from exporter.compare.intervals import fewest_to_show, mean_interval, share_interval
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import (
    AnyDamage,
    ClassDamage,
    Clusters,
    Damage,
    DistributionDamage,
    EmbeddingDamage,
    ratio,
)
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
        return not self.floors or not self.broken(candidate)

    def broken(self, candidate: PlanCandidate) -> list[str]:
        """The floors that a candidate doesn't keep, in words; clearly lost, on the first tokens."""
        return self._lost_by(candidate) or self.broken_by(self.damage(candidate))

    def _lost_by(self, candidate: PlanCandidate) -> list[str]:
        """A floor of classes that all of the interval on the first tokens is beyond, in words."""
        if self._first is None:
            return []
        damage = self._measured(*self._first, candidate.cut)
        if isinstance(damage, ClassDamage) and self.is_beyond(damage):
            return self._broken_by_agreement(damage)
        return []

    def is_beyond(self, damage: AnyDamage) -> bool:
        """Whether all of an interval is beyond a floor: more text would not keep it."""
        floors, finite = self.floors, damage.finite
        if finite.all() and len(finite) < 2:  # which have no interval
            return False
        if isinstance(damage, EmbeddingDamage):
            found = damage.cosines, damage.correlations
            asked = zip((floors.embedding_cosine, floors.similarity), found, strict=True)
            return any(f is not None and _end(values, damage.texts, 1) < f for f, values in asked)
        same = share_interval(damage.agreements, damage.positions)
        floor = floors.top1_agreement
        if floor is not None and same is not None and same.ci95[1] < floor:
            return True
        if isinstance(damage, ClassDamage):
            return False
        rise = damage.nll_sums - damage.baseline_nll_sums
        least = _end(rise, damage.positions, 0)
        return math.isnan(least) or least > floors.log_perplexity_increase

    def broken_by(self, damage: AnyDamage) -> list[str]:
        """The floors that so much damage doesn't keep, in words."""
        if isinstance(damage, EmbeddingDamage):
            return self._broken_by_embeddings(damage)
        found = [] if isinstance(damage, ClassDamage) else self._broken_by_perplexity(damage)
        return [*found, *self._broken_by_agreement(damage)]

    def _broken_by_perplexity(self, damage: Damage) -> list[str]:
        floors = self.floors
        most = _end(damage.nll_sums - damage.baseline_nll_sums, damage.positions, 1)
        if math.isnan(most):
            return ["the perplexity is not a number"]
        if most <= floors.log_perplexity_increase:
            return []
        return [
            f"the perplexity rises by {percent(damage.log_perplexity_increase)}, "
            f"95 % interval up to {percent(most)} "
            f"(allowed: {(floors.perplexity_increase or 0):.1%})"
        ]

    def _broken_by_agreement(self, damage: DistributionDamage) -> list[str]:
        floor = self.floors.top1_agreement
        if floor is None:
            return []
        interval = share_interval(damage.agreements, damage.positions)
        least = damage.top1_agreement if interval is None else interval.ci95[0]
        if least >= floor:
            return []
        what = "classes" if isinstance(damage, ClassDamage) else "tokens"
        return [
            f"{damage.top1_agreement:.1%} of {damage.positions.sum():.0f} likeliest {what} stay "
            f"the same, 95 % interval down to {least:.1%} (at least: {floor:.1%}, which takes "
            f"{fewest_to_show(floor)} or more)"
        ]

    def _broken_by_embeddings(self, damage: EmbeddingDamage) -> list[str]:
        asked = {
            "the embeddings' mean cosine": (self.floors.embedding_cosine, damage.cosines),
            "the correlation of similarities": (self.floors.similarity, damage.correlations),
        }
        found = []
        for what, (floor, values) in asked.items():
            least = _end(values, damage.texts, 0)
            if floor is not None and not least >= floor:
                found.append(
                    f"{what} is {ratio(values, damage.texts):.3f}, "
                    f"95 % interval down to {least:.3f} (at least: {floor:.3f})"
                )
        return found


def _end(sums: NDArray[np.float64], counts: NDArray[np.float64], end: Literal[0, 1]) -> float:
    """The lower or upper end of a mean's 95 % interval; the mean where the samples give none."""
    interval = mean_interval(sums, counts)
    return float(sums.sum() / counts.sum()) if interval is None else interval.ci95[end]


def percent(log_increase: float) -> str:
    """A rise of a log as a share: ``4.9%``."""
    return f"{math.expm1(min(log_increase, 50.0)):.1%}"


def damage_words(damage: AnyDamage) -> str:
    """What a candidate costs, in a few words."""
    if isinstance(damage, EmbeddingDamage):
        return (
            f"mean cosine of the embeddings {damage.cosine:.3f}, "
            f"correlation of similarities {damage.correlation:.3f}"
        )
    if isinstance(damage, ClassDamage):
        return (
            f"KL divergence of the classes {damage.kl:.3f} nats, "
            f"same likeliest class {damage.top1_agreement:.1%}"
        )
    return (
        f"perplexity {math.expm1(min(damage.log_perplexity_increase, 50.0)):+.1%}, "
        f"KL divergence {damage.kl:.3f} nats, same top-1 token {damage.top1_agreement:.1%}"
    )

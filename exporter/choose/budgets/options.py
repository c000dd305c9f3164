"""What may be done to each sublayer, from what was fitted for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.artifacts import HealKind, ImportanceReport
from exporter.choose.budgets.budget import Budget
from exporter.choose.selection import Option
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.heal import Fit

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
class Offer:
    """All options, and what is guessed of them before anything is measured.

    Attributes:
        options: What may be done.
        quality: Share of the branch's output that each option gives back, on tokens that it was
            not fitted on; 0 for nothing at all.
        prior: By sublayer, its score, less what the best option gives back.
    """

    options: Sequence[Option]
    quality: Mapping[Option, float]
    prior: Mapping[SublayerRef, float]


def make_offer(
    report: ImportanceReport,
    budget: Budget,
    heal: HealKind | None,
    fits: Mapping[SublayerRef, Fit],
    protected: Collection[SublayerRef] = (),
    known: Collection[tuple[int, str]] | None = None,
    without_map: Collection[tuple[int, str]] = (),
) -> Offer:
    """Offers every sublayer (or block, where blocks are asked for) in every way allowed.

    Args:
        report: The scores.
        budget: Says which kinds may go.
        heal: What may take a branch's place.
        fits: Of every sublayer, where something may.
        protected: Sublayers that stay.
        known: Sublayers whose size and cost are known; the others stay. None: all.
        without_map: Sublayers whose place no linear map can take.
    """
    options = [
        _option(names, replacement, fits)
        for names in _subjects(report.model.num_layers, budget)
        if not set(names) & set(protected)
        if known is None or set(names) <= set(known)
        for replacement in replacements_of(heal)
        if replacement != "linear" or not set(names) & set(without_map)
    ]
    quality = {option: _quality(option, fits) for option in options}
    best: dict[SublayerRef, float] = {}
    for option in options:
        for name in option.names:
            best[name] = max(best.get(name, 0.0), min(1.0, quality[option]))
    scores = {(score.layer, score.kind): score.score for score in report.scores}
    prior = {name: scores.get(name, 0.0) * (1 - given) for name, given in best.items()}
    return Offer(options, quality, prior)


def _subjects(num_layers: int, budget: Budget) -> Iterator[tuple[SublayerRef, ...]]:
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

"""Limits on quality: the figures that are held against them, with their intervals, and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exporter.artifacts.base import TEXTS, Nouns
from exporter.choose.budgets.budget import Floors
from exporter.compare.intervals import fewest_to_show, mean_interval, share_interval
from exporter.models.ablation.damage import SIMILARITY, AnyDamage, Clusters

HIGH, LOW, SAME = "log_perplexity_increase_high", "cosine_low", "top1_agreement_low"
ENDS = {
    "log_perplexity_increase": HIGH, "cosine": LOW, "top1_agreement": SAME,
    SIMILARITY: f"{SIMILARITY}_low",
}  # fmt: skip
"""By figure, what the end of its 95 % interval is called that is further from the whole model."""
BETTER_ENDS = {
    "log_perplexity_increase": "log_perplexity_increase_low", "cosine": "cosine_high",
    "top1_agreement": "top1_agreement_high", SIMILARITY: f"{SIMILARITY}_high",
}  # fmt: skip
"""The other end of each."""
LEAST_SHARE = 0.08
"""No healing is expected to leave less than this share of a cut's cost."""


def damage_figures(damage: AnyDamage, clusters: Clusters = None) -> dict[str, float]:
    """What a plan says of its damage, with standard errors over documents where they are known."""
    damage = damage if clusters is None else damage.by_document(clusters)
    return {
        name: float(value)
        for name, value in damage.figures().items()
        if value is not None and not math.isnan(value)
    }


def ends_of(intervals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Both ends of each figure's interval, by their names."""
    ends: dict[str, float] = {}
    for name, (low, high) in intervals.items():
        worse, better = (high, low) if name == "log_perplexity_increase" else (low, high)
        ends |= {ENDS[name]: worse, BETTER_ENDS[name]: better}
    return ends


def held_figures(damage: AnyDamage) -> dict[str, float]:
    """What limits are held against: a damage's figures, with the ends of their intervals."""
    figures, known = damage_figures(damage), dict[str, tuple[float, float]]()
    for name, (values, counts, is_share) in damage.sums().items():
        interval = (share_interval if is_share else mean_interval)(values, counts)
        if interval is not None:
            known[name] = interval.ci95
    for name, worst in damage.worst.items():
        if not math.isfinite(figures.get(name, math.nan)):
            figures[name], known[name] = worst, (worst, worst)
    return figures | ends_of(known)


@dataclass(frozen=True)
class Rung:
    """A cut that was healed and measured."""

    number: int  # its place among the cuts, from 0 on
    cost: float
    high: float  # the upper end of its 95 % interval
    low: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the limit is kept for certain."""
        return self.high <= 1.0

    @property
    def is_beyond(self) -> bool:
        """Whether the limit is broken for certain."""
        return self.low > 1.0


def rung_of(number: int, figures: Mapping[str, float], floors: Floors) -> Rung:
    """A cut by the share of the limits that it uses up: the one rule of what holds them."""

    def used_up(ends: Mapping[str, str], rise: float, share: float) -> float:
        unknown = {name: rise if name == "log_perplexity_increase" else share for name in ends}
        return floors.used_up(
            {name: figures.get(ends[name], value) for name, value in unknown.items()}
        )

    worse, better = used_up(ENDS, math.inf, -math.inf), used_up(BETTER_ENDS, 0.0, 1.0)
    return Rung(number, floors.used_up(figures), worse, better)


def is_hopeless(figures: Mapping[str, float], floors: Floors) -> bool:
    """Whether no healing can be expected to bring a bare cut within the limits."""
    return floors.used_up(figures) * LEAST_SHARE > 1


def percent(log_increase: float) -> str:
    """A rise of a log as a share: ``4.9%``."""
    return f"{math.expm1(min(log_increase, 50.0)):.1%}"


_LOWEST_LIMIT = 0.001
"""Of a share that is to be kept, as it is written."""
_OF_EMBEDDINGS = {
    "cosine": "mean cosine of the embeddings", SIMILARITY: "correlation of similarities",
}  # fmt: skip


@dataclass(frozen=True)
class QualityLimits:
    """The limits on quality, and how they are told."""

    floors: Floors
    read: Nouns = TEXTS
    usual: bool = False

    def outcome(self, figures: Mapping[str, float], healed: str = "") -> str:
        """What a cut costs, by what it was healed, and whether that is within the limits."""
        by = f" after healing ({healed})" if healed else ""
        if "log_perplexity_increase" in figures:
            return self._of_tokens(figures, by)
        return (self._of_embeddings if "cosine" in figures else self._of_classes)(figures, by)

    def _of_embeddings(self, figures: Mapping[str, float], by: str) -> str:
        values = {"cosine": self.floors.embedding_cosine, SIMILARITY: self.floors.similarity}
        names = [
            f"the {_OF_EMBEDDINGS[name]} is {figures[name]:.3f}{by}"
            f"{_until('down', figures, ENDS[name], '{:.3f}'.format)}, {self._least(f'{floor:.3f}')}"
            for name, floor in values.items()
            if floor is not None and name in figures
        ]
        if self.floors.similarity is not None and SIMILARITY not in figures:
            names.append(f"all texts are equally similar{by}, so there is no correlation")
        return "; ".join(names)

    def _of_classes(self, figures: Mapping[str, float], by: str) -> str:
        several, floor = self.read.several, self.floors.top1_agreement or 0.5
        return (
            f"{figures['top1_agreement']:.1%} of the {several} keep their likeliest class{by}"
            f"{_until('down', figures, SAME, '{:.1%}'.format)}, {self._least(f'{floor:.1%}')}, "
            f"which takes {fewest_to_show(floor)} {several} or more"
        )

    def _of_tokens(self, figures: Mapping[str, float], by: str) -> str:
        limit, floor = self.floors.perplexity_increase, self.floors.top1_agreement
        allowed = "" if limit is None else f", {limit:.1%} {self._allowed}"
        return (
            f"the perplexity is {percent(figures['log_perplexity_increase'])} higher{by}"
            f"{_until('up', figures, HIGH, percent)}{allowed}; same top-1 token "
            f"{figures['top1_agreement']:.1%}{_until('down', figures, SAME, '{:.1%}'.format)}"
            + ("" if floor is None else f", {self._least(f'{floor:.1%}')}")
        )

    @property
    def _allowed(self) -> str:
        return "is the usual limit without a number" if self.usual else "allowed"

    def _least(self, floor: str) -> str:
        text = "is the usual limit without a number" if self.usual else "is asked for"
        return f"at least {floor} {text}"

    def allowing(self, healed: Mapping[str, float]) -> str:
        """The options that would allow a cut; empty where none can."""
        floors = self.floors
        limits = {
            "--min-embedding-cosine": (floors.embedding_cosine, "cosine"),
            "--min-similarity": (floors.similarity, SIMILARITY),
            "--min-top1-agreement": (floors.top1_agreement, "top1_agreement"),
        }
        words = []
        for option, (floor, name) in limits.items():
            end = healed.get(ENDS[name], healed.get(name, -math.inf))
            if floor is None or end >= floor:
                continue
            if end < _LOWEST_LIMIT:
                return ""
            words.append(f"{option} {_rounded(end, math.floor):.3f}")
        rise = healed.get(HIGH, 0.0)
        if rise > floors.log_perplexity_increase:
            words.append(f"--at-most {_rounded(math.expm1(min(50.0, rise)), math.ceil):.1%}")
        return f"{' '.join(words)} would allow it; " if words else ""


def _until(
    way: str, figures: Mapping[str, float], end: str, written: Callable[[float], str]
) -> str:
    if end not in figures:
        return ", without an interval: too few samples"
    return f", 95 % interval {way} to {written(figures[end])}"


def _rounded(share: float, towards: Callable[[float], int]) -> float:
    """To a thousandth, to the side on which a limit still allows the share."""
    return towards(1000 * share) / 1000

"""Limits on quality: what holds them, by all of a figure's interval, and how that is told."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, cast

from exporter.artifacts.base import TEXTS, Nouns
from exporter.artifacts.plan_figures import LIMITED, PlanFigure, kind_of
from exporter.artifacts.store import Store
from exporter.choose.budgets.budget import NO_FLOORS, Floors
from exporter.compare.intervals import fewest_to_show
from exporter.heal.healed import ends_95
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.damage import AnyDamage, Clusters, D, D_co, damage_of_numbers
from exporter.models.sentence_folder import pooling_of
from exporter.models.tasks import POSITIONS, meter_here
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel
    from exporter.models.texts.calibration import CalibrationText


Key = frozenset[tuple[int, str, int]]


class MeterOf(Protocol[D_co]):
    """What a search asks, as a :class:`exporter.models.ablation.meter.CutMeter` answers it."""

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""

    def measure_many(
        self,
        cut: BranchReplacements,
        others: Sequence[BranchReplacements],
        progress: Progress = QUIET,
    ) -> Sequence[D_co]:
        """The damage of a cut, and of several others."""


Meter = MeterOf[AnyDamage]


_AT_ONCE = 12
"""Cuts that are measured before they are written down. Each such group runs the cut that they start
from once more; a command that is stopped loses one group."""


def searched_meter(
    loaded: LoadedModel,
    text: CalibrationText,
    batch_size: int = 4,
    *,
    embeds: bool = False,  # by embeddings, whatever the model is judged by
    kept: Path | None = None,
) -> RememberingMeter[AnyDamage]:
    """Measures nothing twice."""
    about = {
        **loaded.identity(),
        "ids": text.ids_sha256,
        "positions": POSITIONS,
        "embeds": embeds,
        "pooling": asdict(pooling_of(loaded.path)),
    }
    return RememberingMeter(meter_here(loaded, text, batch_size, embeds=embeds), kept, about)


class RememberingMeter(Generic[D]):
    """Keeps what was measured, and where a file is given also between runs.

    Replacements are named by their numbers, so that a later run knows those that were kept, or that
    it has fitted alike.
    """

    def __init__(
        self, meter: MeterOf[D], kept: Path | None = None, about: Mapping[str, object] | None = None
    ) -> None:
        self._meter = meter
        self._known: dict[Key, D] = {}
        self._held: list[BranchReplacement] = [NOTHING]  # what is kept by id() must stay alive
        self._store = None if kept is None else Store(kept, dict(about or {}))

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self._meter.num_layers

    def measure_many(
        self,
        cut: BranchReplacements,
        others: Sequence[BranchReplacements],
        progress: Progress = QUIET,
    ) -> list[D]:
        """The damage of a cut, and of several others, measured only where it is not known."""
        keys = [_key(replacements) for replacements in (cut, *others)]
        for key, item in zip(keys, (cut, *others), strict=True):
            self._recall(key, item)
        missing = {k: c for k, c in zip(keys[1:], others, strict=True) if k not in self._known}
        missing.pop(keys[0], None)
        if missing or keys[0] not in self._known:
            for group in self._groups(list(missing.values())):
                many = self._meter.measure_many(cut, group, progress)
                for replacements, damage in zip((cut, *group), many, strict=True):
                    self._keep(replacements, damage)
        return [self._known[key] for key in keys]

    def _groups(self, cuts: list[BranchReplacements]) -> list[list[BranchReplacements]]:
        """What is measured before it is written down; one empty group where only the cut is."""
        if self._store is None:
            return [cuts]
        return [cuts[at : at + _AT_ONCE] for at in range(0, max(1, len(cuts)), _AT_ONCE)]

    def _keep(self, cut: BranchReplacements, damage: D) -> None:
        key = _key(cut)
        if key in self._known:
            return
        self._known[key] = damage
        self._held.extend(cut.values())
        if self._store is not None:
            numbers = {f.name: getattr(damage, f.name).tolist() for f in fields(damage)}
            self._store.keep(_name(cut), numbers)

    def _recall(self, key: Key, cut: BranchReplacements) -> None:
        if self._store is None or key in self._known:
            return
        result = self._store.find(_name(cut))
        # What is kept may be of another kind, or not ours.
        with contextlib.suppress(ValueError, TypeError, AttributeError, StopIteration):
            self._known[key] = cast("D", damage_of_numbers(result))


def _key(cut: BranchReplacements) -> Key:
    return frozenset((layer, kind, id(what)) for (layer, kind), what in cut.items())


def _name(cut: BranchReplacements) -> str:
    """``whole``, or the branches that are cut: ``mlp 0, attention 12 (6a1f...)``."""

    def named(layer: int, kind: str) -> str:
        what = cut[layer, kind]  # type: ignore[index]
        return f"{kind} {layer}" + ("" if what is NOTHING else f" ({what.sha256})")

    return ", ".join(named(*ref) for ref in sorted(cut)) or "whole"


_LEAST_TRAINED, _LEAST_FITTED = 0.08, 0.15


def least_share(trains: bool) -> float:
    """The least share of a cut's cost that healing, with or without training, may leave."""
    return _LEAST_TRAINED if trains else _LEAST_FITTED


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
    return {
        f"{key}_{end}": value
        for key, ends in intervals.items()
        for end, value in zip(("low", "high"), ends, strict=True)
    }


def held_figures(damage: AnyDamage) -> dict[str, float]:
    """What limits are held against: a damage's figures, with the ends of their intervals."""
    figures, known = damage_figures(damage), dict[str, tuple[float, float]]()
    for figure in damage.kind.limited:
        key, broken = figure.key, figure.broken
        if broken is not None and not math.isfinite(figures.get(key, math.nan)):
            figures[key], known[key] = broken, (broken, broken)
        elif (ends := ends_95(damage, figure)) is not None:
            known[key] = ends
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
    worse, better = {}, {}
    for figure in LIMITED.values():
        worse[figure.key] = figures.get(figure.worse_end, figure.worst)
        better[figure.key] = figures.get(figure.better_end, figure.unchanged)
    return Rung(number, *map(floors.used_up, (figures, worse, better)))


def is_hopeless(figures: Mapping[str, float], floors: Floors, share: float) -> bool:
    """Whether healing that leaves such a share can't bring a bare cut within the limits."""
    return rung_of(0, figures, floors).low * share > 1


_LOWEST_LIMIT = 0.001
"""Of a share that is to be kept, as it is written."""


@dataclass(frozen=True)
class QualityLimits:
    """The limits on quality, and how they are told."""

    floors: Floors
    read: Nouns = TEXTS
    usual: bool = False

    def outcome(self, figures: Mapping[str, float], healed: str = "") -> str:
        """What a cut costs, by what it was healed, and whether that is within the limits."""
        by = f" after healing ({healed})" if healed else ""
        words = []
        for figure in kind_of(figures).limited:
            is_limited = self.floors.on(figure) is not None
            if figure.key in figures and (is_limited or figure.is_always_said):
                words.append(self._told(figure, figures, by))
            elif is_limited:
                words.append(f"all texts are equally similar{by}, so there is no correlation")
        return "; ".join(words)

    def _told(self, figure: PlanFigure, figures: Mapping[str, float], by: str) -> str:
        limit, until = self.floors.on(figure), ", without an interval: too few samples"
        usual = "is the usual limit without a number" if self.usual else ""
        several = self.read.several

        def written(value: float) -> str:
            return format(figure.held(value), figure.digits)

        if figure.worse_end in figures:
            way = "down" if figure.higher_is_better else "up"
            until = f", 95 % interval {way} to {written(figures[figure.worse_end])}"
        floor = "" if limit is None else format(limit, figure.digits)
        return figure.sentence.format(
            name=figure.name,
            value=written(figures[figure.key]),
            by=by,
            until=until,
            allowed=floor and f", {floor} {usual or 'allowed'}",
            least=floor and f", at least {floor} {usual or 'is asked for'}",
            several=several,
            fewest=floor and f", which takes {fewest_to_show(limit or 0.0)} {several} or more",
        )

    def allowing(self, healed: Mapping[str, float]) -> str:
        """The options that would allow a cut; empty where none can."""
        words = []
        for figure in sorted(LIMITED.values(), key=lambda one: not one.higher_is_better):
            default = figure.worst if figure.higher_is_better else 0.0
            end = healed.get(figure.worse_end, healed.get(figure.key, default))
            limit = self.floors.on(figure)
            if limit is None or figure.used_up(end, limit) <= 1:
                continue
            if figure.higher_is_better and end < _LOWEST_LIMIT:
                return ""
            towards, digits = (math.floor, ".3f") if figure.higher_is_better else (math.ceil, ".1%")
            allowed = towards(1000 * figure.held(end)) / 1000  # to where it still holds
            words.append(f"{figure.flag} {format(allowed, digits)}")
        return f"{' '.join(words)} would allow it; " if words else ""


class QualityCheck:
    """Holds cuts against floors, on tokens that the search doesn't see.

    A floor is kept where all of the 95 % interval over samples keeps it.
    """

    def __init__(
        self,
        meter: Meter,
        floors: Floors = NO_FLOORS,
        first: tuple[Meter, Clusters] | None = None,  # None: each cut is measured on all
        clusters: Clusters = None,
    ) -> None:
        self._whole = _remembering(meter), clusters
        self._first = None if first is None else (_remembering(first[0]), first[1])
        self.floors = floors

    def damage_of(self, cut: BranchReplacements) -> AnyDamage:
        """What a cut costs."""
        return _measured(self._whole, cut)

    def holds(self, cut: BranchReplacements) -> bool:
        """Whether a cut keeps the floors."""
        return not self.floors or self.rung(cut).holds

    def rung(self, cut: BranchReplacements) -> Rung:
        """What of the floors a cut uses up; of one that is clearly lost, on the first samples."""
        if self._first is not None:
            few = self.rung_with(_measured(self._first, cut))
            if few.is_beyond:
                return few
        return self.rung_with(self.damage_of(cut))

    def rung_with(self, damage: AnyDamage) -> Rung:
        """What of the floors so much damage uses up."""
        return rung_of(0, held_figures(damage), self.floors)

    def outcome(self, damage: AnyDamage) -> str:
        """What a cut costs, in words, beside the floors."""
        return QualityLimits(self.floors).outcome(held_figures(damage))


def _remembering(meter: Meter) -> RememberingMeter[AnyDamage]:
    return meter if isinstance(meter, RememberingMeter) else RememberingMeter(meter)


def _measured(
    on: tuple[RememberingMeter[AnyDamage], Clusters], cut: BranchReplacements
) -> AnyDamage:
    meter, clusters = on
    damage = meter.measure_many(cut, [])[0]
    return damage if clusters is None else damage.by_document(clusters)

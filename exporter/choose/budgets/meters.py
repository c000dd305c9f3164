"""What measures the damage of cuts; no cut is measured twice, nor after an interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, cast

from exporter.artifacts.store import Store
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.damage import AnyDamage, D, D_co, damage_of_numbers
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

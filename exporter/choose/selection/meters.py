"""What measures the damage of cuts; no cut is measured twice, nor after an interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from exporter.artifacts.store import Store
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.choices import ChoiceItems, ChoiceMeter
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import DamageMeter
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel
    from exporter.score import CalibrationText

Key = frozenset[tuple[int, str, int]]


class Meter(Protocol):
    """What a search asks, as :class:`exporter.models.ablation.meter.DamageMeter` answers it."""

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""

    def measure_many(
        self,
        cut: BranchReplacements,
        others: Sequence[BranchReplacements],
        progress: Progress = QUIET,
    ) -> list[Damage]:
        """The damage of a cut, and of several others."""


MakeMeter = Callable[["LoadedModel", "CalibrationText", int, int], Meter]
"""From a model, a text, the samples in a batch and how many positions go on one that is looked at,
to what measures cuts on them."""


POSITIONS = 2
"""Answers are compared at every second position: the head costs a third of a small model."""


def meter_here(
    loaded: LoadedModel, text: CalibrationText, batch_size: int = 4, positions: int = POSITIONS
) -> Meter:
    """Measures in this process, on all of a text."""
    return DamageMeter(
        loaded.model, text.input_ids, text.mask, batch_size=batch_size, positions=positions
    )


def searched_meter(
    loaded: LoadedModel,
    text: CalibrationText,
    batch_size: int = 4,
    *,
    kept: Path | None = None,
    make: MakeMeter = meter_here,
) -> RememberingMeter:
    """Measures nothing twice.

    Args:
        loaded: The model.
        text: What is searched on.
        batch_size: Samples in one forward pass.
        kept: Keeps what was measured of branches that are left out.
        make: Makes what measures.
    """
    about = {**loaded.identity(), "ids": text.ids_sha256, "positions": POSITIONS}
    return RememberingMeter(make(loaded, text, batch_size, POSITIONS), kept, about)


def items_meter(
    loaded: LoadedModel, tasks: Sequence[ChoiceItems], *, kept: Path | None = None
) -> RememberingMeter:
    """Measures damage to the choice among answers, in this process, nothing twice.

    Args:
        loaded: The model.
        tasks: Whose items are searched on.
        kept: Keeps what was measured of branches that are left out.
    """
    about = {**loaded.identity(), "items": [task.part.ids_sha256 for task in tasks]}
    items = [item for task in tasks for item in task.items]
    return RememberingMeter(ChoiceMeter(loaded.model, items), kept, about)


class RememberingMeter:
    """Keeps what was measured, and where a file is given also between runs.

    Only cuts that leave branches out are written: a fitted replacement has no name that a later run
    would know again.

    Args:
        meter: What measures.
        kept: The file of an :class:`exporter.artifacts.store.Store`; None keeps nothing between
            runs.
        about: What the figures depend on: the model, the text.

    Raises:
        UsageError: The file is something else.
        UnsafeInputError: A line of it is nested deeper than any that is written here.
    """

    def __init__(
        self, meter: Meter, kept: Path | None = None, about: Mapping[str, object] | None = None
    ) -> None:
        self._meter = meter
        self._known: dict[Key, Damage] = {}
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
    ) -> list[Damage]:
        """The damage of a cut, and of several others, measured only where it is not known."""
        keys = [_key(each) for each in (cut, *others)]
        for key, each in zip(keys, (cut, *others), strict=True):
            self._recall(key, each)
        missing = {k: c for k, c in zip(keys[1:], others, strict=True) if k not in self._known}
        missing.pop(keys[0], None)
        if missing or keys[0] not in self._known:
            found = self._meter.measure_many(cut, list(missing.values()), progress)
            for each, damage in zip((cut, *missing.values()), found, strict=True):
                self._keep(each, damage)
        return [self._known[key] for key in keys]

    def _keep(self, cut: BranchReplacements, damage: Damage) -> None:
        key = _key(cut)
        if key in self._known:
            return
        self._known[key] = damage
        self._held.extend(cut.values())
        if self._store is not None and _leaves_out(cut):
            numbers = {f.name: getattr(damage, f.name).tolist() for f in fields(Damage)}
            self._store.keep(_name(cut), numbers)

    def _recall(self, key: Key, cut: BranchReplacements) -> None:
        if self._store is None or key in self._known or not _leaves_out(cut):
            return
        told = self._store.find(_name(cut))
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            self._known[key] = Damage(**{k: np.asarray(v, np.float64) for k, v in told.items()})


def _key(cut: BranchReplacements) -> Key:
    return frozenset((layer, kind, id(what)) for (layer, kind), what in cut.items())


def _leaves_out(cut: BranchReplacements) -> bool:
    return all(what is NOTHING for what in cut.values())


def _name(cut: BranchReplacements) -> str:
    """``whole``, or the branches that are left out: ``mlp 0, attention 12``."""
    return ", ".join(f"{kind} {layer}" for layer, kind in sorted(cut)) or "whole"

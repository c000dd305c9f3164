"""A meter that never measures one cut twice, nor after it was interrupted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from exporter.ablation import NOTHING, Cut, Damage, Substitute
from exporter.errors import UsageError
from exporter.files import write_text
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import append
from graph_passes.files.reading import TABLE_BYTES, parse_json, read_text

if TYPE_CHECKING:
    from exporter.importance import CalibrationText
    from exporter.loading.model_source import LoadedModel

_FIRST = '{"about": '

Key = frozenset[tuple[int, str, int]]


class Meter(Protocol):
    """What a search asks, as :class:`exporter.ablation.DamageMeter` answers it."""

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""

    def measure_many(
        self, cut: Cut, others: Sequence[Cut], progress: Progress = QUIET
    ) -> list[Damage]:
        """The damage of a cut, and of several others."""


MakeMeter = Callable[["LoadedModel", "CalibrationText", int, int], Meter]
"""From a model, a text, the samples in a batch and how many positions go on one that is looked at,
to what measures cuts on them."""


class RememberingMeter:
    """Keeps what was measured, and where a journal is given also between runs.

    A journal holds one JSON object a line: first what it is about, then a cut with its damage. Only
    cuts that leave branches out are written: a fitted substitute has no name that a later run would
    know again. A line that was cut short by a crash is left out.

    Args:
        meter: What measures.
        journal: The file; None keeps nothing between runs.
        about: What the figures depend on (the model, the text). A journal about something else is
            begun anew.

    Raises:
        UsageError: The journal's file is something else.
        UnsafeInputError: A line of it is nested deeper than any that is written here.
    """

    def __init__(
        self, meter: Meter, journal: Path | None = None, about: Mapping[str, object] | None = None
    ) -> None:
        self._meter = meter
        self._known: dict[Key, Damage] = {}
        self._held: list[Substitute] = [NOTHING]  # what is kept by id() must stay alive
        self._journal = journal
        if journal is not None:
            self._open(journal, json.dumps({"about": dict(about or {})}, sort_keys=True))

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self._meter.num_layers

    def measure_many(
        self, cut: Cut, others: Sequence[Cut], progress: Progress = QUIET
    ) -> list[Damage]:
        """The damage of a cut, and of several others, measured only where it is not known."""
        keys = [_key(each) for each in (cut, *others)]
        missing = {k: c for k, c in zip(keys[1:], others, strict=True) if k not in self._known}
        missing.pop(keys[0], None)
        if missing or keys[0] not in self._known:
            found = self._meter.measure_many(cut, list(missing.values()), progress)
            for each, damage in zip((cut, *missing.values()), found, strict=True):
                self._keep(each, damage)
        return [self._known[key] for key in keys]

    def _keep(self, cut: Cut, damage: Damage) -> None:
        key = _key(cut)
        if key in self._known:
            return
        self._known[key] = damage
        self._held.extend(cut.values())
        if self._journal is None or any(what is not NOTHING for what in cut.values()):
            return
        numbers = {f.name: getattr(damage, f.name).tolist() for f in fields(Damage)}
        append(self._journal, json.dumps({"cut": sorted(cut), "damage": numbers}) + "\n")

    def _open(self, journal: Path, first: str) -> None:
        there = journal.exists()
        lines = read_text(journal, limit=TABLE_BYTES).split("\n") if there else []
        if lines and not lines[0].startswith(_FIRST):
            raise UsageError(
                f"{journal} is there and is no journal of a search.",
                "Move it away, or name another output.",
            )
        if not lines or lines[0] != first:
            write_text(journal, first + "\n")
            return
        for line in lines[1:-1]:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                self._learn(parse_json(line, str(journal)))
        if lines[-1]:  # The line that a crash cut short must not run into the next.
            append(journal, "\n")

    def _learn(self, told: Any) -> None:
        damage = Damage(**{k: np.asarray(v, np.float64) for k, v in told["damage"].items()})
        self._known[_key(dict.fromkeys(map(tuple, told["cut"]), NOTHING))] = damage


def _key(cut: Cut) -> Key:
    return frozenset((layer, kind, id(what)) for (layer, kind), what in cut.items())

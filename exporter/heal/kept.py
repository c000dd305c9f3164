"""Fits on disk, for a later call: each file says what it is about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import CalibrationRef, ModelRef
from exporter.files import sha256_bytes, sha256_file, staged_directory
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import TABLE_BYTES, read_json
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.heal.fit import Fit

_NUMBERS, _NOTES = "fits.safetensors", "fits.json"
ALONE, IN_TURN = "alone", "in-turn"
"""The folders of fits that were made each alone, and one on the other."""


@dataclass(frozen=True)
class FitStore:
    """Fits one by one, as they are finished.

    Attributes:
        folder: Where; made when something is kept.
        about: What they depend on; others are not found.
    """

    folder: Path
    about: Mapping[str, Any]

    def keep(self, name: SublayerRef, fit: Fit) -> None:
        """Writes one down, whole or not at all."""
        write_fits(self._place(name), self.about, {name: fit})

    def find(
        self, names: Iterable[SublayerRef], progress: Progress = QUIET
    ) -> dict[SublayerRef, Fit]:
        """Those of the named ones that were kept."""
        found: dict[SublayerRef, Fit] = {}
        for name in names:
            found.update(read_fits(self._place(name), self.about) or {})
        if found:
            progress.say(f"healing: {counted(len(found), 'fit')} of an earlier call are used")
        return found

    def _place(self, name: SublayerRef) -> Path:
        return self.folder / f"{name[1]}.{name[0]}"


class KnownFits:
    """Fits by name, from a store where it has them, else made and kept there.

    Args:
        store: None: nothing is kept.
        names: What will be asked for.
        progress: Told how many are there.
    """

    def __init__(
        self, store: FitStore | None, names: Iterable[SublayerRef], progress: Progress
    ) -> None:
        self._store = store
        self._known = {} if store is None else store.find(names, progress)

    def get(self, name: SublayerRef, make: Callable[[], Fit]) -> Fit:
        """One of them."""
        if name not in self._known:
            self._known[name] = make()
            if self._store is not None:
                self._store.keep(name, self._known[name])
        return self._known[name]


def write_fits(folder: Path, about: Mapping[str, Any], fits: Mapping[SublayerRef, Fit]) -> None:
    """Writes fits down, whole or not at all.

    Args:
        folder: For them alone; an earlier one is replaced.
        about: What they depend on; JSON.
        fits: By layer and kind.
    """
    from safetensors.torch import save_file

    with staged_directory(folder) as stage:
        tensors, notes = {}, []
        for (layer, kind), fit in fits.items():
            tensors[f"{kind}.{layer}.mean"] = fit.bias.bias
            tensors[f"{kind}.{layer}.bias"] = fit.linear.bias
            for number, weight in enumerate(fit.linear.maps):
                tensors[f"{kind}.{layer}.map{number}"] = weight
            explained = fit.bias_explained, fit.linear_explained
            notes.append([layer, kind, len(fit.linear.maps), fit.ridge, *explained])
        held = {name: t.contiguous().clone() for name, t in tensors.items() if t is not None}
        save_file(held, stage / _NUMBERS)
        told = {"about": dict(about), "fits": notes, "sha256": sha256_file(stage / _NUMBERS)}
        (stage / _NOTES).write_text(json.dumps(told), encoding="utf-8")


def read_fits(folder: Path, about: Mapping[str, Any]) -> dict[SublayerRef, Fit] | None:
    """The fits that were written down; None where there are none, or none about this."""
    numbers = folder / _NUMBERS
    try:
        told = read_json(folder / _NOTES, limit=TABLE_BYTES)
        if told["about"] != dict(about) or told["sha256"] != sha256_file(numbers):
            return None
        return _read(numbers, told["fits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(file: Path, notes: list[Any]) -> dict[SublayerRef, Fit]:
    from safetensors.torch import load_file

    from exporter.heal.fit import Fit
    from exporter.models.ablation import BranchReplacement

    held = load_file(file)
    found: dict[SublayerRef, Fit] = {}
    for layer, kind, maps, ridge, bias_explained, linear_explained in notes:
        name = f"{kind}.{layer}"
        weights = tuple(held[f"{name}.map{number}"] for number in range(maps))
        found[SublayerRef(layer, kind)] = Fit(
            bias=BranchReplacement(held[f"{name}.mean"]),
            linear=BranchReplacement(held[f"{name}.bias"], weights),
            ridge=ridge,
            bias_explained=bias_explained,
            linear_explained=linear_explained,
        )
    return found


def about_fits(
    model: ModelRef, dtype: str, text: CalibrationRef, rank: int | None
) -> dict[str, Any]:
    """What fits depend on."""
    told = text.model_dump_json()
    return {
        "model": model.sha256,
        "dtype": dtype,
        "text": sha256_bytes(told.encode()),
        "rank": rank,
    }

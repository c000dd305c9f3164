"""What may take a branch's place, as it was fitted, and fits that a later call finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.store import Store
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

Choices = Mapping[Replacement, tuple[float, BranchReplacement]]
"""What may take a branch's place, with the share of its output that it gives back."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What may take one branch's place.

    Attributes:
        bias: The mean output.
        linear: The ridge map with its bias, float32; two factors where a rank was asked for.
        ridge: What the map was fitted with, relative to the mean eigenvalue of its inputs.
        bias_explained: Share of the output's ``sum |y|²`` over held-out tokens that ``bias``,
            fitted on the others, takes away; 1 at best, negative where it does harm.
        linear_explained: The same for ``linear``.
        intercept_explained: The same for a map with an intercept, where ``linear`` was fitted
            without one.
    """

    bias: BranchReplacement
    linear: BranchReplacement
    ridge: float
    bias_explained: float
    linear_explained: float
    intercept_explained: float | None = None

    @property
    def choices(self) -> Choices:
        """What may stand in the place, the simplest first."""
        return {
            "none": (0.0, NOTHING),
            "bias": (self.bias_explained, self.bias),
            "linear": (self.linear_explained, self.linear),
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its numbers by name."""
        maps = {f"map{number}": weight for number, weight in enumerate(self.linear.maps)}
        tensors = {"mean": self.bias.bias, "bias": self.linear.bias, **maps}
        return {name: t.numpy() for name, t in tensors.items() if t is not None}

    def figures(self) -> list[float]:
        """What else is known of it."""
        own = [self.ridge, self.bias_explained, self.linear_explained]
        return own if self.intercept_explained is None else [*own, self.intercept_explained]

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]], figures: list[float]) -> Fit:
        """From what :meth:`arrays` and :meth:`figures` gave."""
        import torch

        held = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        maps = tuple(held[name] for name in sorted(held) if name.startswith("map"))
        return cls(BranchReplacement(held["mean"]), BranchReplacement(held["bias"], maps), *figures)


def most_explained(choices: Choices) -> BranchReplacement:
    """What gives back most of a branch's output over held-out tokens."""
    return max(choices.values(), key=lambda choice: choice[0])[1]


class FitStore:
    """Fits one by one, as they are finished.

    Args:
        path: The store's file; None keeps nothing between calls.
        loaded: The model that they are of.
        text: What they are fitted on.
        made_from: What they depend on beside these; JSON.
    """

    def __init__(
        self, path: Path | None, loaded: LoadedModel, text: CalibrationText, **made_from: Any
    ) -> None:
        about = {
            **loaded.identity(),
            "text": text.ref.model_dump(mode="json"),
            "ids": text.ids_sha256,
        }
        self._store = None if path is None else Store(path, {**about, **made_from})
        self._found: dict[SublayerRef, Fit] = {}

    def find(
        self, names: Iterable[SublayerRef], progress: Progress = QUIET
    ) -> dict[SublayerRef, Fit]:
        """Those of the named ones that an earlier call has kept."""
        for name in names:
            kept = None if self._store is None else self._store.find_arrays(str(name))
            if kept is not None:
                with contextlib.suppress(KeyError, TypeError):  # anybody may have written it
                    self._found[name] = Fit.of(kept[1], kept[0])
        if self._found:
            told = counted(len(self._found), "fit")
            progress.say(f"healing: {told} of an earlier call are used")
        return dict(self._found)

    def keep(self, name: SublayerRef, fit: Fit) -> None:
        """Writes one down, whole or not at all."""
        if self._store is not None:
            self._store.keep_arrays(str(name), fit.figures(), fit.arrays())

    def get(self, name: SublayerRef, make: Callable[[], Fit]) -> Fit:
        """One that was found, or else is made and kept."""
        if name in self._found:
            return self._found[name]
        fit = make()
        self.keep(name, fit)
        return fit

"""Fits what takes the places of a plan's branches, of one kind everywhere or the best of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifacts import HealKind, Training
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.artifacts.servers import places_of
from exporter.heal.fit import Choices, Fit, fit_branches, most_explained
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.ablation.meter import CutMeter, Within
from exporter.models.loading.model_source import LoadedModel
from exporter.models.tasks import meter_here
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef


@dataclass(frozen=True)
class Made:
    """What makes up for the dropped branches, not yet written."""

    held_out: CalibrationText
    branch_replacements: dict[SublayerRef, BranchReplacement]
    fits: Mapping[SublayerRef, Fit] = field(default_factory=dict)
    weights: Mapping[str, ChangedWeight] = field(default_factory=dict)
    deciding: CalibrationText | None = None  # None where nothing was decided
    training: Training | None = None  # how they came about; None where nothing was trained
    within: Within | None = None  # None where it keeps its own


@dataclass(frozen=True)
class Fitting:
    """What is fitted, on which texts, and how."""

    loaded: LoadedModel
    texts: HealingTexts
    names: list[SublayerRef]
    options: HealOptions
    work: Path | None  # keeps the state of a training; None keeps nothing
    progress: Progress

    def best(
        self, chooser: CalibrationText
    ) -> tuple[dict[SublayerRef, BranchReplacement], dict[SublayerRef, Fit]]:
        """The kind that does best in each place, as a text tells that nothing was fitted on."""
        fits, size = self._alone(), self.options.batch_size
        meter: CutMeter[Any] = meter_here(self.loaded, chooser, size, positions=1)
        return _by_damage(meter, fits, self._choices(fits), self.progress), fits

    def alike(
        self, kind: HealKind
    ) -> tuple[dict[SublayerRef, BranchReplacement], dict[SublayerRef, Fit]]:
        """The same kind everywhere."""
        held = [name for name in self.names if kind in places_of(self.options.server, name)]
        fits = self._alone(held, uses_maps=kind != "bias")
        bias = {name: fit.bias if kind == "bias" else fit.linear for name, fit in fits.items()}
        return {name: bias.get(name, NOTHING) for name in self.names}, fits

    def _choices(self, fits: Mapping[SublayerRef, Fit]) -> dict[SublayerRef, Choices]:
        """What the server holds in each place, the simplest first."""
        return {
            name: {
                kind: what
                for kind, what in fit.choices.items()
                if kind in places_of(self.options.server, name)
            }
            for name, fit in fits.items()
        }

    def _alone(
        self, names: list[SublayerRef] | None = None, *, uses_maps: bool = True
    ) -> dict[SublayerRef, Fit]:
        """Each fitted on the whole model."""
        return fit_branches(
            self.loaded,
            self.texts.fitting,
            self.names if names is None else names,
            ridge=self.options.ridge,
            intercept=self.options.intercept,
            batch_size=self.options.batch_size,
            uses_maps=uses_maps,
            progress=self.progress,
        )


def _by_damage(
    meter: CutMeter[Any],
    fits: Mapping[SublayerRef, Fit],
    choices: Mapping[SublayerRef, Choices],
    progress: Progress = QUIET,
) -> dict[SublayerRef, BranchReplacement]:
    """What leaves the answers nearest, branch after branch, the others as they stand.

    Begins with what explains most of each output, and goes through the branches once, from the
    last layer down, so that each run begins as high as it can.
    """
    current = {name: most_explained(own) for name, own in choices.items()}
    with progress.task("choose replacements", total=len(fits), unit="sublayers") as task:
        for name in sorted(fits, reverse=True):
            taken = current[name]
            options = [what for _, what in choices[name].values()]
            others = [one for one in options if one is not taken]
            cuts = [{**current, name: one} for one in others]
            damages = meter.measure_many(current, cuts)
            pairs = zip([taken, *others], damages, strict=True)
            # Of two that are equal the simpler one.
            best = min(pairs, key=lambda pair: (pair[1].distance, options.index(pair[0])))
            current[name] = best[0]
            task.advance()
    return current

"""Fits what takes the places of a plan's branches, of one kind everywhere or the best of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifacts import HealKind, Training
from exporter.artifacts.replacement_file import ChangedWeight
from exporter.artifacts.servers import places_of
from exporter.heal.fit import fit_branches
from exporter.heal.fits import Choices, Fit, FitStore, most_explained
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import kind_of
from exporter.heal.sequential import fit_sequential
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.ablation.embeddings import meter_here
from exporter.models.ablation.meter import CutMeter, Within
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef


@dataclass(frozen=True)
class Made:
    """What makes up for the dropped branches, not yet written.

    Attributes:
        held_out: Samples that nothing was fitted on, nor chosen or stopped by.
        deciding: Those that chose kinds, or stopped a training; None where nothing was decided.
        branch_replacements: What takes the branches' places.
        fits: What is known of the single fits.
        weights: The new values of weights that the model keeps, by the parameter's name.
        training: How they came about; None where nothing was trained.
        within: Makes what gives the model those weights; None where it keeps its own.
    """

    held_out: CalibrationText
    branch_replacements: dict[SublayerRef, BranchReplacement]
    fits: Mapping[SublayerRef, Fit] = field(default_factory=dict)
    weights: Mapping[str, ChangedWeight] = field(default_factory=dict)
    deciding: CalibrationText | None = None
    training: Training | None = None
    within: Within | None = None


@dataclass(frozen=True)
class Fitting:
    """What is fitted, on which texts, and how.

    Attributes:
        loaded: The model.
        texts: What is fitted on, and what is held out.
        names: The sublayers whose places are taken.
        options: How.
        work: Keeps each fit once it is finished; None keeps nothing.
        progress: Told what goes on.
    """

    loaded: LoadedModel
    texts: HealingTexts
    names: list[SublayerRef]
    options: HealOptions
    work: Path | None
    progress: Progress

    def best(
        self, chooser: CalibrationText
    ) -> tuple[dict[SublayerRef, BranchReplacement], dict[SublayerRef, Fit]]:
        """The kind that does best in each place, as a text tells that nothing was fitted on."""
        fits, size = self._alone(), self.options.batch_size
        meter: CutMeter[Any] = meter_here(self.loaded, chooser, size, positions=1)
        found = _by_damage(meter, fits, self._choices(fits), self.progress)
        if self.options.sequential:
            return self._in_turn({name: kind_of(what) for name, what in found.items()}), {}
        return found, fits

    def alike(
        self, kind: HealKind
    ) -> tuple[dict[SublayerRef, BranchReplacement], dict[SublayerRef, Fit]]:
        """The same kind everywhere."""
        held = [name for name in self.names if kind in places_of(self.options.server, name)]
        if self.options.sequential:
            chosen = {name: kind if name in held else "none" for name in self.names}
            return self._in_turn(chosen), {}
        fits = self._alone(held, uses_maps=kind != "bias")
        found = {name: fit.bias if kind == "bias" else fit.linear for name, fit in fits.items()}
        return {name: found.get(name, NOTHING) for name in self.names}, fits

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
            rank=self.options.rank,
            ridge=self.options.ridge,
            intercept=self.options.intercept,
            batch_size=self.options.batch_size,
            uses_maps=uses_maps,
            store=self._store("alone"),
            progress=self.progress,
        )

    def _in_turn(self, choices: Mapping[SublayerRef, Any]) -> dict[SublayerRef, BranchReplacement]:
        """Each fitted with those before it in their places."""
        told = [[*name, choices[name]] for name in sorted(choices)]
        return fit_sequential(
            self.loaded,
            self.texts.fitting,
            choices,
            rank=self.options.rank,
            ridge=self.options.ridge,
            intercept=self.options.intercept,
            batch_size=self.options.batch_size,
            store=self._store("in-turn", choices=told),
            progress=self.progress,
        )

    def _store(self, name: str, **more: Any) -> FitStore | None:
        """Keeps fits by what they depend on, the tokens themselves among it."""
        if self.work is None:
            return None
        how = {"rank": self.options.rank, "ridge": self.options.ridge, **more}
        if not self.options.intercept:
            how["intercept"] = False
        return FitStore(self.work / f"{name}.jsonl", self.loaded, self.texts.fitting, **how)


def _by_damage(
    meter: CutMeter[Any],
    fits: Mapping[SublayerRef, Fit],
    choices: Mapping[SublayerRef, Choices],
    progress: Progress = QUIET,
) -> dict[SublayerRef, BranchReplacement]:
    """What leaves the answers nearest, branch after branch, the others as they stand.

    Begins with what explains most of each output, and goes through the branches once, from the
    last layer down, so that each run begins as high as it can.

    Args:
        meter: Of the model, on samples that nothing was fitted on.
        fits: What was fitted for each branch.
        choices: What may take each branch's place.
        progress: Told of every run.
    """
    current = {name: most_explained(own) for name, own in choices.items()}
    with progress.task("choose replacements", total=len(fits), unit="sublayers") as task:
        for name in sorted(fits, reverse=True):
            taken = current[name]
            options = [what for _, what in choices[name].values()]
            others = [one for one in options if one is not taken]
            cuts = [{**current, name: one} for one in others]
            damages = meter.measure_many(current, cuts)
            found = zip([taken, *others], damages, strict=True)
            # Of two that are equal the simpler one.
            best = min(found, key=lambda pair: (pair[1].distance, options.index(pair[0])))
            current[name] = best[0]
            task.advance()
    return current

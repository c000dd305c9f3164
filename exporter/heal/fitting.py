"""Fits what takes the places of a plan's branches, of one kind everywhere or the best of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import HealKind, Training
from exporter.artifacts.replacement_file import ChangedWeight
from exporter.artifacts.servers import places_of
from exporter.heal.fit import (
    Adding,
    Branch,
    Choices,
    Fit,
    FitStore,
    fit_branches,
    fitted,
    held_out_tokens,
    most_explained,
    observing,
    tell_if_few,
)
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import kind_of
from exporter.heal.ridge import Sums
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.ablation.embeddings import meter_here
from exporter.models.ablation.meter import CutMeter, Within
from exporter.models.ablation.streams import LayerRunner
from exporter.models.architectures import (
    SublayerModules,
    layer_modules,
    named_sublayers,
    sublayers,
)
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import LayerModules, LayerStates, tapped
from exporter.models.texts.batches import Batch
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from exporter.score.streaming import HiddenStates, room_for_states
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    import torch


class LayerWalk:
    """What stands between two layers is kept for each stream, in memory where it fits."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[LayerModules],
        text: CalibrationText,
        batch_size: int,
        streams: int,
        stack: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        self._model, self._layers = model, layers
        self._runner = LayerRunner(model, layers)
        self._streams, self._stack, self._progress = streams, stack, progress
        self._states: HiddenStates | None = None
        self._kept: set[tuple[int, int]] = set()
        self.batches = text.batches(batch_size)

    def run(self, layer: int, batch: Batch, stream: int) -> LayerStates:
        """Takes a batch over a layer: from what the stream has kept, or else the embedding."""
        given = self.kept(stream, batch) if (stream, batch.number) in self._kept else None
        found: list[LayerStates] = []
        with self._runner.only(layer), tapped([self._layers[layer]], found.append):
            self._runner.run(batch.inputs(self._model.device), given)
        return found[0]

    def keep(self, stream: int, batch: Batch, tensor: torch.Tensor) -> None:
        """Keeps ``[batch, tokens, hidden]`` in the place of what the stream had for the batch."""
        states = self._states = self._states or self._room(tensor)
        states.put(stream, batch.number, tensor.cpu())
        self._kept.add((stream, batch.number))

    def kept(self, stream: int, batch: Batch) -> torch.Tensor:
        """What was kept, on the model's device."""
        assert self._states is not None, "nothing was kept yet"
        return self._states.get(stream, batch.number).to(self._model.device)

    def _room(self, tensor: torch.Tensor) -> HiddenStates:
        shapes = [(*batch.ids.shape, tensor.shape[-1]) for batch in self.batches]
        room = room_for_states(
            None, self._streams, shapes, tensor.dtype, weights_bytes=0, progress=self._progress
        )
        return self._stack.enter_context(room)


_HELD_OUT = 0.2
"""Share of the samples that a ridge is judged on."""
COMPENSATION = 0.0
_WHOLE, _HEALED = 0, 1
"""The two streams that are kept between two layers."""


def fit_sequential(
    loaded: LoadedModel,
    text: CalibrationText,
    choices: Mapping[SublayerRef, Replacement],
    *,
    rank: int | None = None,  # of the maps; None: full
    ridge: float | None = None,  # None: chosen for each branch on held-out tokens
    intercept: bool = True,
    batch_size: int = 4,
    # from 0 to 1: how much of the error that came in below a map shall take back
    compensation: float = COMPENSATION,
    store: FitStore | None = None,
    progress: Progress = QUIET,
) -> dict[SublayerRef, BranchReplacement]:
    """Fits a replacement for each chosen branch, from the first layer up.

    The text is run a layer at a time, so that all fits together cost about three runs of the
    model. Of the text two streams are kept, in memory where they fit, else in a file.
    """
    parts = {part.ref: part for part in sublayers(loaded.model)}
    wanted = named_sublayers(choices, len(parts) // 2)
    later = held_out_tokens(text.mask, _HELD_OUT)
    fits = store or FitStore(None, loaded, text)
    fits.find([name for name in wanted if choices[name] != "none"], progress)
    found: dict[SublayerRef, BranchReplacement] = {}
    with contextlib.ExitStack() as stack:
        pair = _TwoModels(loaded.model, text, batch_size, later, stack, progress)
        last = max((layer for layer, _ in wanted), default=-1)
        with progress.task("fit layer by layer", total=last + 1, unit="layers") as task:
            for layer in range(last + 1):
                for name in [name for name in wanted if name[0] == layer]:
                    found[name] = NOTHING
                    if choices[name] != "none":
                        sums = partial(pair.sums, parts[name], compensation, found)
                        how = {"rank": rank, "ridge": ridge, "intercept": intercept}
                        make = partial(_fitted, sums, how)
                        fit = fits.get(name, make)
                        found[name] = fit.bias if choices[name] == "bias" else fit.linear
                pair.advance(layer, found)
                task.advance()
    if "linear" in choices.values():
        tell_if_few(text, loaded, progress)
    return found


class _TwoModels:
    """The whole and the healed model in front of the same layer; one while they are the same."""

    def __init__(
        self,
        model: Any,
        text: CalibrationText,
        batch_size: int,
        later: NDArray[np.bool_],
        stack: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        self._model, self._later, self._differ = model, later, False
        layers = layer_modules(model)
        self._walk = LayerWalk(model, layers, text, batch_size, 2, stack, progress)

    def sums(
        self,
        part: SublayerModules,
        compensation: float,
        found: Mapping[SublayerRef, BranchReplacement],
    ) -> tuple[Sums, Sums]:
        """Of what a branch reads in the healed model, and of what its map shall give."""
        import torch

        sums: dict[SublayerRef, tuple[Sums, Sums]] = {}
        name = part.ref
        below = {n: s for n, s in found.items() if n[0] == part.layer and n != name}
        for batch in self._walk.batches:
            adding = Adding(sums, batch, self._later, self._model.device)
            heard: list[torch.Tensor] = []
            with (
                branches_replaced(self._model, below),
                observing([part], batch.ids.shape, _into(heard)),
            ):
                healed = self._walk.run(part.layer, batch, _HEALED)
            read, given = heard
            if compensation and (self._differ or below):
                whole = self._walk.run(part.layer, batch, _WHOLE)
                target = _behind(whole, part) - _before(healed, part)
                given = torch.lerp(given.to(target), target, compensation)
            adding(part, read, given)
        return sums[name]

    def advance(self, layer: int, found: Mapping[SublayerRef, BranchReplacement]) -> None:
        """Takes both over a layer; from the first deletion on they part."""
        here = {name: what for name, what in found.items() if name[0] == layer}
        for batch in self._walk.batches:
            whole = healed = self._walk.run(layer, batch, _WHOLE).output
            if here or self._differ:
                with branches_replaced(self._model, here):
                    healed = self._walk.run(layer, batch, _HEALED).output
            self._walk.keep(_WHOLE, batch, whole)
            self._walk.keep(_HEALED, batch, healed)
        self._differ = self._differ or bool(here)


def _fitted(sums: Callable[[], tuple[Sums, Sums]], how: Mapping[str, Any]) -> Fit:
    return fitted(*sums(), **how)


def _into(heard: list[torch.Tensor]) -> Branch:
    def keep(_part: SublayerModules, x: torch.Tensor, y: torch.Tensor) -> None:
        heard[:] = [x, y]

    return keep


def _before(states: LayerStates, part: SublayerModules) -> torch.Tensor:
    """The stream that a branch adds to."""
    if part.kind == "attention":
        return states.entering
    return states.attended if states.mlp_in is states.entering else states.mlp_in


def _behind(states: LayerStates, part: SublayerModules) -> torch.Tensor:
    """The stream with the branch in it."""
    if part.kind == "attention":
        return states.attended
    return states.leaving if states.mlp_in is states.entering else states.mlp_out


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
    work: Path | None  # keeps each fit once it is finished; None keeps nothing
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

"""Fits what takes the branches' place one after the other, each on the already healed model.

What a branch reads in the healed model is not what it reads in the whole one: the maps below it
err a little. A map that is fitted on what it will really read can make good for that. Its target is
``c · (stream of the whole model behind the branch - stream of the healed one in front of it)
+ (1 - c) · (what the branch itself would add in the healed model)``: with ``c = 0`` the map does as
the branch would, with ``c = 1`` it takes back all of the error that came in below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.heal.activations import Branch, held_out_tokens, observing
from exporter.heal.fit import Adding, fitted, tell_if_few
from exporter.heal.fits import Fit, FitStore
from exporter.heal.layer_walk import LayerWalk
from exporter.heal.statistics import Sums
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.anatomy.architectures import (
    SublayerModules,
    layer_modules,
    named_sublayers,
    sublayers,
)
from exporter.models.anatomy.residual_stream import LayerStates
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    import torch

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
    rank: int | None = None,
    ridge: float | None = None,
    intercept: bool = True,
    batch_size: int = 4,
    compensation: float = COMPENSATION,
    store: FitStore | None = None,
    progress: Progress = QUIET,
) -> dict[SublayerRef, BranchReplacement]:
    """Fits a replacement for each chosen branch, from the first layer up.

    The text is run a layer at a time, so that all fits together cost about three runs of the
    model. Of the text two streams are kept, in memory where they fit, else in a file.

    Args:
        loaded: The model.
        text: The calibration samples; padding is left out.
        choices: What shall take which branch's place: ``none``, ``bias`` or ``linear``.
        rank: Of the maps; None: full.
        ridge: Relative to the mean eigenvalue of a branch's inputs; None: chosen for each branch
            on held-out tokens.
        intercept: Whether maps may have one.
        batch_size: Samples in one forward pass.
        compensation: From 0 to 1: how much of the error that came in below a map shall take back.
        store: Keeps what is finished; what is there of an earlier call is not fitted again.
        progress: Told of every layer, and when the tokens are few.

    Raises:
        HealingError: As :func:`exporter.heal.fit.fit_branches`.
        PlanError: When a branch does not exist.
        ScoringError: The disk has no room for the streams.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
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

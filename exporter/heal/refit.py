"""Fits the last products before gaps anew, so that the stream behind a gap is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.heal.fit import Adding, held_out_tokens
from exporter.heal.fold_places import Place
from exporter.heal.ridge import RIDGES, LinearMap, Sums, choose_ridge, solve
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacements,
    branches_replaced,
    first_input,
)
from exporter.models.ablation.streams import LayerRunner
from exporter.models.changed_weights import OwnValue, is_transposed, swapped
from exporter.models.residual_stream import LayerModules, LayerStates, hooked, tapped
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch
from exporter.progress import QUIET, Progress
from exporter.score.streaming import HiddenStates, room_for_states
from graph_passes.types import SublayerKind, SublayerRef

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
        progress: Progress,
    ) -> None:
        self._model, self._layers = model, layers
        self._runner = LayerRunner(model, layers)
        self._streams, self._progress = streams, progress
        self._states: HiddenStates | None = None
        self._kept: set[tuple[int, int]] = set()
        self.batches = text.batches(batch_size)

    def run(self, layer: int, batch: Batch, stream: int) -> LayerStates:
        """Takes a batch over a layer: from what the stream has kept, or else the embedding."""
        given = self.kept(stream, batch) if (stream, batch.number) in self._kept else None
        states: list[LayerStates] = []
        with self._runner.only(layer), tapped([self._layers[layer]], states.append):
            self._runner.run(batch.inputs(self._model.device), given)
        return states[0]

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
        return room_for_states(
            None, self._streams, shapes, tensor.dtype, weights_bytes=0, progress=self._progress
        )


_ATTENDED, _WHOLE, _HEALED = 0, 1, 2
"""The streams that are kept: the whole model's within and behind a layer, the healed one's."""


def refitted(
    model: Any,
    text: CalibrationText,
    layers: Sequence[LayerModules],
    cut: BranchReplacements,
    places: Sequence[Place],
    *,
    ridge: float | None = None,  # None: chosen for each on held-out tokens
    batch_size: int = 4,
    progress: Progress = QUIET,
) -> list[OwnValue]:
    """The new values of products, each fitted with those before it in the model.

    The text is run a layer at a time, up to the last gap, about three times in all.
    """
    later = held_out_tokens(text.mask)
    ridges = RIDGES if ridge is None else [ridge]
    walk = LayerWalk(model, layers, text, batch_size, 3, progress)
    pair = _Pair(model, layers, walk, cut)
    with progress.task("fold layer by layer", total=len(places), unit="gaps") as task:
        for place in places:
            pair.go_to(place)
            pair.fit(place, later, ridges)
            task.advance()
    return pair.changes


class _Pair:
    """The whole and the healed model; the whole one is ahead by the gap behind a product."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[LayerModules],
        walk: LayerWalk,
        cut: BranchReplacements,
    ) -> None:
        self._model, self._layers, self._walk = model, layers, walk
        self.changes: list[OwnValue] = []
        self._cut = cut
        self._first_cut = min(cut).layer
        self._whole_at = self._healed_at = 0

    def go_to(self, place: Place) -> None:
        """Takes the healed model in front of a product's layer, and the whole one over its gap."""
        while self._healed_at < place.part.layer:
            if not self.changes and self._whole_at == self._healed_at < self._first_cut:
                self._share(self._healed_at)
            else:
                self._heal(self._healed_at)
            self._healed_at += 1
        while self._whole_at <= place.until.layer:
            self._teach(self._whole_at)
            self._whole_at += 1

    def fit(self, place: Place, later: NDArray[np.bool_], ridges: Sequence[float]) -> None:
        """Changes a product where that gains something."""
        first, held_out = self._sums(place, later)
        choice = choose_ridge(first, held_out, ridges)
        if choice.linear_explained > 0:
            self._add(place, solve(first.plus(held_out), choice.ridge))

    def _add(self, place: Place, fitted: LinearMap) -> None:
        """Adds a map to what a product gives; its bias where the product has one."""
        product: Any = place.product
        added = {"weight": fitted.weight.T if is_transposed(product) else fitted.weight}
        if product.bias is not None:
            added["bias"] = fitted.bias
        for name, numbers in added.items():
            old = getattr(product, name)
            change = (numbers / place.part.multiplier).to(old.device).float()
            new = old.detach().double() + change
            self.changes.append(OwnValue(f"{place.name}.{name}", old, new.to(old.dtype)))

    def _sums(self, place: Place, later: NDArray[np.bool_]) -> tuple[Sums, Sums]:
        """Of what a product reads, to what it lacks; over the first and the held-out tokens."""
        results: dict[SublayerRef, tuple[Sums, Sums]] = {}
        read: list[torch.Tensor] = []

        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[:] = [first_input(args, kwargs).clone()]

        with hooked([place.product.register_forward_pre_hook(keep, with_kwargs=True)]):
            for batch in self._walk.batches:
                states = self._run_healed(place.part.layer, batch)
                within = self._is_within(place.part.ref)
                now = states.attended if within else states.leaving
                kept = _ATTENDED if self._is_within(place.until) else _WHOLE
                wanted = self._walk.kept(kept, batch).to(now)
                counts = 1 / wanted.float().square().mean(-1).clamp(min=1e-30)
                u = read.pop().reshape(*batch.ids.shape, -1)
                adding = Adding(results, batch, later, self._model.device)
                adding(place.part, u, wanted - now, counts)
        pair = results[place.part.ref]
        if place.product.bias is None:
            for sums in pair:
                sums.through_origin()
        return pair

    def _is_within(self, ref: SublayerRef) -> bool:
        """Whether the stream behind a branch is that between attention and MLP."""
        return ref.kind == "attention" and self._layers[ref.layer].form == "sequential"

    def _teach(self, layer: int) -> None:
        """Takes the whole model over a layer."""
        for batch in self._walk.batches:
            states = self._walk.run(layer, batch, _WHOLE)
            self._walk.keep(_ATTENDED, batch, states.attended.to(states.output))
            self._walk.keep(_WHOLE, batch, states.output)

    def _share(self, layer: int) -> None:
        """Takes both over a layer in which they are the same."""
        self._teach(layer)
        self._whole_at += 1
        for batch in self._walk.batches:
            self._walk.keep(_HEALED, batch, self._walk.kept(_WHOLE, batch))

    def _heal(self, layer: int) -> None:
        """Takes the healed model over a layer; one that is dropped hands on what it is given."""
        kinds: tuple[SublayerKind, ...] = ("attention", "mlp")
        gone = all(self._cut.get(SublayerRef(layer, kind)) is NOTHING for kind in kinds)
        for batch in self._walk.batches:
            if not (gone and layer):
                self._walk.keep(_HEALED, batch, self._run_healed(layer, batch).output)

    def _run_healed(self, layer: int, batch: Batch) -> LayerStates:
        here = {ref: what for ref, what in self._cut.items() if ref.layer == layer}
        with swapped(self.changes), branches_replaced(self._model, here):
            return self._walk.run(layer, batch, _HEALED)

"""Fits the last products before gaps anew, so that the stream behind a gap is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.heal.fit import Adding, held_out_tokens
from exporter.heal.fold_places import Place, Writer
from exporter.heal.ridge import RIDGES, LinearMap, Sums, choose_ridge, lost, solve
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


_FACTORS = 0.5, 2.0
"""A stream is multiplied by no less and no more."""


def fitted_map(first: Sums, later: Sums, ridges: Sequence[float]) -> LinearMap | None:
    """The map on the tokens of both; None where it would take nothing away on ``later``."""
    choice = choose_ridge(first, later, ridges)
    if choice.linear_explained <= 0:
        return None
    return solve(first.plus(later), choice.ridge)


def map_and_factor(
    first: Sums, later: Sums, ridges: Sequence[float]
) -> tuple[LinearMap | None, float]:
    """The map, and the factor: 1 where another would take nothing more away on ``later``."""
    choice = choose_ridge(_third(first, 0), _third(later, 0), ridges)
    if choice.linear_explained <= 0:
        return None, 1.0
    change = _factor(first, later, choice.ridge) - 1
    maps = solve(first.plus(later), choice.ridge)
    lacking, stream = _rows(maps, 0), _rows(maps, 1)
    weight = lacking.weight - change * stream.weight
    return LinearMap(weight, lacking.bias - change * stream.bias), 1 + change


def _factor(first: Sums, later: Sums, ridge: float) -> float:
    maps = solve(first, ridge)
    cross, square = _products(first, maps)
    low, high = _FACTORS
    change = min(max(cross / square, low - 1), high - 1) if square > 0 else 0.0
    cross, square = _products(later, maps)
    gains = 2 * change * cross > change**2 * square
    return 1 + change if gains else 1.0


def _products(sums: Sums, maps: LinearMap) -> tuple[float, float]:
    """What the maps leave of ``t - x`` times what they leave of ``x``, and the latter's square."""
    lacking, stream, wanted = (lost(_third(sums, n), _rows(maps, n)) for n in range(3))
    return (wanted - lacking - stream) / 2, stream


def _third(sums: Sums, number: int) -> Sums:
    return sums.columns(_part(len(sums.y) // 3, number))


def _rows(maps: LinearMap, number: int) -> LinearMap:
    part = _part(len(maps.bias) // 3, number)
    return LinearMap(maps.weight[part], maps.bias[part])


def _part(width: int, number: int) -> slice:
    return slice(number * width, (number + 1) * width)


_ATTENDED, _WHOLE, _HEALED = 0, 1, 2
"""The streams that are kept: the whole model's within and behind a layer, the healed one's."""


def refitted(
    model: Any,
    text: CalibrationText,
    layers: Sequence[LayerModules],
    cut: BranchReplacements,
    places: Sequence[Place],
    *,
    writers: Sequence[Writer] = (),
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
    pair = _Pair(model, layers, walk, cut, writers)
    with progress.task("fold layer by layer", total=len(places), unit="gaps") as task:
        for place in places:
            pair.go_to(place)
            pair.fit(place, later, ridges)
            task.advance()
    return [change.value for change in pair.changes.values()]


@dataclass(eq=False)
class _Change:
    """What a weight is multiplied by, and what is added to it; rounded to its dtype once."""

    value: OwnValue
    factor: float = 1.0
    added: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str, parameter: torch.nn.Parameter) -> _Change:
        """A weight as it is."""
        return cls(OwnValue(name, parameter, parameter.detach().clone()))

    def multiply(self, factor: float) -> None:
        """Multiplies the new value."""
        self.factor *= factor
        if self.added is not None:
            self.added *= factor
        self._round()

    def add(self, numbers: torch.Tensor) -> None:
        """Adds to the new value."""
        numbers = numbers.to(self.value.other.device).float()
        self.added = numbers if self.added is None else self.added + numbers
        self._round()

    def _round(self) -> None:
        wide = self.value.parameter.detach().double() * self.factor
        new = wide if self.added is None else wide + self.added
        self.value.other = new.to(self.value.other.dtype)


class _Pair:
    """The whole and the healed model; the whole one is ahead by the gap behind a product."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[LayerModules],
        walk: LayerWalk,
        cut: BranchReplacements,
        writers: Sequence[Writer],
    ) -> None:
        self._model, self._layers, self._walk, self._writers = model, layers, walk, writers
        self.changes: dict[str, _Change] = {}
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
        """Changes a product, and with it what writes to the stream, where that gains something."""
        sums = self._sums(place, later)
        if self._writers:
            change, factor = map_and_factor(*sums, ridges)
        else:
            change, factor = fitted_map(*sums, ridges), 1.0
        if factor != 1:
            self._multiply(place, factor)
        if change is not None:
            self._add(place, change)

    def _multiply(self, place: Place, factor: float) -> None:
        """Multiplies the stream behind a product, in front of its gap."""
        for writer in self._writers:
            if writer.ref is None or writer.ref <= place.part.ref:
                self._change(writer.name, writer.parameter).multiply(factor)
        for batch in self._walk.batches if self._healed_at else ():
            self._walk.keep(_HEALED, batch, self._walk.kept(_HEALED, batch) * factor)

    def _add(self, place: Place, change: LinearMap) -> None:
        """Adds a map to what a product gives; its bias where the product has one."""
        product: Any = place.product
        added = {"weight": change.weight.T if is_transposed(product) else change.weight}
        if product.bias is not None:
            added["bias"] = change.bias
        for name, numbers in added.items():
            weight = self._change(f"{place.name}.{name}", getattr(product, name))
            weight.add(numbers / place.part.multiplier)

    def _change(self, name: str, parameter: torch.nn.Parameter) -> _Change:
        if name not in self.changes:
            self.changes[name] = _Change.of(name, parameter)
        return self.changes[name]

    def _sums(self, place: Place, later: NDArray[np.bool_]) -> tuple[Sums, Sums]:
        """Of what a product reads, to what it lacks; over the first and the held-out tokens.

        With writers, to what it lacks, the stream and the wanted stream side by side.
        """
        import torch

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
                beside = (now, wanted) if self._writers else ()
                adding(place.part, u, torch.cat([wanted - now, *beside], -1), counts)
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
        values = [change.value for change in self.changes.values()]
        with swapped(values), branches_replaced(self._model, here):
            return self._walk.run(layer, batch, _HEALED)

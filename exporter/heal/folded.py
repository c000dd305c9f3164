"""Kept products that make up for a cut: where they are, their fits, and what they gain."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.errors import HealingError
from exporter.heal.fit import (
    RIDGES,
    Adding,
    Fit,
    Fitting,
    HeldOut,
    LinearMap,
    Made,
    Sums,
    choose_ridge,
    solve,
    tell_if_few,
)
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
    branches_replaced,
    first_input,
)
from exporter.models.ablation.streams import LayerRunner
from exporter.models.architectures import SublayerModules, layer_modules, sublayers_of
from exporter.models.changed_weights import (
    OwnValue,
    changes_of,
    is_transposed,
    products_in,
    refuse_quantized,
    swapped,
)
from exporter.models.residual_stream import (
    LayerModules,
    LayerStates,
    first_tensor,
    hooked,
    probe_inputs,
    run_backbone,
    tapped,
)
from exporter.models.tasks import meter_here
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerKind, SublayerRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Place:
    """A kept branch whose last product can be fitted anew."""

    part: SublayerModules
    name: str
    product: torch.nn.Module
    until: SublayerRef
    gap: tuple[SublayerRef, ...]


def places_of(
    model: Any, layers: Sequence[LayerModules], cut: Collection[SublayerRef]
) -> tuple[list[Place], list[SublayerRef]]:
    """The last products before gaps, and the kept branches that should have had one.

    A gap with no product before it, such as one at the bottom of the model, is made up for by the
    first product behind it.
    """
    if layers[0].form == "post_norm":  # a map of the stream can't be added to a weight there
        return [], []
    parts = {part.ref: part for part in sublayers_of(layers)}
    runs = _runs(layers, cut)
    products = products_of(model, [parts[run.kept] for run in runs if run.kept is not None])
    places, without = [], []
    lacking = False
    for run in runs:
        if not (run.gap or lacking):
            continue
        if run.kept in products:
            name, product = products[run.kept]
            places.append(Place(parts[run.kept], name, product, run.until, run.gap))
        elif run.kept is not None:
            without.append(run.kept)
        lacking = run.kept not in products
    return places, without


class _Run(NamedTuple):
    """A kept branch and the gap behind it; None kept before the first one."""

    kept: SublayerRef | None
    until: SublayerRef
    gap: tuple[SublayerRef, ...]


def _runs(layers: Sequence[LayerModules], cut: Collection[SublayerRef]) -> list[_Run]:
    """Of branches that read the same stream the last kept one."""
    runs: list[_Run] = []
    for modules in layers:
        kinds: tuple[SublayerKind, ...] = ("attention", "mlp")
        refs = tuple(SublayerRef(modules.number, kind) for kind in kinds)
        for group in [refs] if modules.form == "parallel" else [refs[:1], refs[1:]]:
            kept = [ref for ref in group if ref not in cut]
            gap = tuple(ref for ref in group if ref in cut)
            if kept or not runs:
                runs.append(_Run(kept[-1] if kept else None, group[-1], gap))
            else:
                runs[-1] = runs[-1]._replace(until=group[-1], gap=runs[-1].gap + gap)
    return runs


def products_of(
    model: Any, parts: Sequence[SublayerModules]
) -> dict[SublayerRef, tuple[str, torch.nn.Module]]:
    """The product that gives what a branch adds, as a few tokens show; a weight of its own."""
    uses = Counter(id(item) for _, item in model.named_parameters(remove_duplicate=False))
    results: dict[SublayerRef, tuple[str, torch.nn.Module]] = {}
    outputs: dict[int, torch.Tensor] = {}

    def keep(module: Any, _inputs: Any, output: Any) -> None:
        outputs[id(module)] = first_tensor(output).clone()

    def look(part: SublayerModules, products: Any, _module: Any, _in: Any, output: Any) -> None:
        for name, product in products.items():
            if _are_alike(outputs.get(id(product)), first_tensor(output)):
                results[part.ref] = name, product

    def hooks() -> Iterator[Any]:
        for part in parts:
            inside: dict[str, Any] = products_in(model, part.contribution.modules())
            own = {name: item for name, item in inside.items() if uses[id(item.weight)] == 1}
            yield from (item.register_forward_hook(keep) for item in own.values())
            yield part.contribution.register_forward_hook(partial(look, part, own))

    with hooked(hooks()):
        run_backbone(model, probe_inputs(model))
    return results


def _are_alike(given: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    if given is None or given.numel() != wanted.numel():
        return False
    return bool((given.reshape(wanted.shape) == wanted).all())


_ATTENDED, _WHOLE, _HEALED = 0, 1, 2
"""The streams that are kept: the whole model's within and behind a layer, the healed one's."""


def refitted(
    model: Any,
    text: CalibrationText,
    layers: Sequence[LayerModules],
    cut: BranchReplacements,
    places: Sequence[Place],
    *,
    batch_size: int = 4,
    progress: Progress = QUIET,
) -> list[OwnValue]:
    """The new values of products, each fitted with those before it in the model.

    The text is run a layer at a time, up to the last gap, about three times in all.
    """
    later = HeldOut.of(text)
    pair = _Pair(model, layers, text.batches(batch_size), cut)
    with progress.task("fold layer by layer", total=len(places), unit="gaps") as task:
        for place in places:
            pair.go_to(place)
            pair.fit(place, later)
            task.advance()
    return pair.changes


class _Pair:
    """The whole and the healed model; the whole one is ahead by the gap behind a product.

    What stands between two layers is kept for each stream.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[LayerModules],
        batches: Sequence[Batch],
        cut: BranchReplacements,
    ) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self._runner = LayerRunner(model, layers)
        self._states: dict[tuple[int, int], torch.Tensor] = {}
        self.changes: list[OwnValue] = []
        self._cut = cut
        self._first_cut = min(cut).layer
        self._whole_at = self._healed_at = 0

    def _run(self, layer: int, batch: Batch, stream: int) -> LayerStates:
        """Takes a batch over a layer: from what the stream has kept, or else the embedding."""
        given = self._states.get((stream, batch.number))
        states: list[LayerStates] = []
        with self._runner.only(layer), tapped([self._layers[layer]], states.append):
            device = self._model.device
            self._runner.run(batch.inputs(device), None if given is None else given.to(device))
        return states[0]

    def _keep(self, stream: int, batch: Batch, tensor: torch.Tensor) -> None:
        """Keeps ``[batch, tokens, hidden]`` in the place of what the stream had for the batch."""
        self._states[stream, batch.number] = tensor.detach().cpu().clone()

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

    def fit(self, place: Place, later: HeldOut) -> None:
        """Changes a product where that gains something."""
        first, held_out = self._sums(place, later)
        choice = choose_ridge(first, held_out, RIDGES)
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

    def _sums(self, place: Place, later: HeldOut) -> tuple[Sums, Sums]:
        """Of what a product reads, to what it lacks; over the first and the held-out tokens."""
        results: dict[SublayerRef, tuple[Sums, Sums]] = {}
        read: list[torch.Tensor] = []

        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[:] = [first_input(args, kwargs).clone()]

        with hooked([place.product.register_forward_pre_hook(keep, with_kwargs=True)]):
            for batch in self._batches:
                states = self._run_healed(place.part.layer, batch)
                within = self._is_within(place.part.ref)
                now = states.attended if within else states.leaving
                kept = _ATTENDED if self._is_within(place.until) else _WHOLE
                wanted = self._states[kept, batch.number].to(now)
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
        for batch in self._batches:
            states = self._run(layer, batch, _WHOLE)
            self._keep(_ATTENDED, batch, states.attended.to(states.output))
            self._keep(_WHOLE, batch, states.output)

    def _share(self, layer: int) -> None:
        """Takes both over a layer in which they are the same."""
        self._teach(layer)
        self._whole_at += 1
        for batch in self._batches:
            self._states[_HEALED, batch.number] = self._states[_WHOLE, batch.number]

    def _heal(self, layer: int) -> None:
        """Takes the healed model over a layer; one that is dropped hands on what it is given."""
        kinds: tuple[SublayerKind, ...] = ("attention", "mlp")
        gone = all(self._cut.get(SublayerRef(layer, kind)) is NOTHING for kind in kinds)
        for batch in self._batches:
            if not (gone and layer):
                self._keep(_HEALED, batch, self._run_healed(layer, batch).output)

    def _run_healed(self, layer: int, batch: Batch) -> LayerStates:
        here = {ref: what for ref, what in self._cut.items() if ref.layer == layer}
        with swapped(self.changes), branches_replaced(self._model, here):
            return self._run(layer, batch, _HEALED)


@contextlib.contextmanager
def folded(fitting: Fitting) -> Iterator[Made]:
    """Folds what is lost into kept products; the model is as before afterwards.

    Where no weight precedes a gap that could be fitted anew, ``options.replacements`` take the
    branches' places. One half of the held-out samples tells whether the result is better than the
    bare cut; the other is for those who judge.
    """
    deciding, judging = fitting.texts.halves
    replaced, fits = _replaced(fitting)
    values = folded_values(fitting, fitting.texts.fitting, replaced)
    tell_if_few(fitting.texts.fitting, fitting.loaded, fitting.progress)
    _refuse_loss(fitting, deciding, replaced, values)
    yield Made(
        judging,
        replaced,
        fits,
        weights=changes_of(values),
        deciding=deciding,
        within=lambda: swapped(values),
    )


def folded_values(
    fitting: Fitting, text: CalibrationText, replaced: BranchReplacements | None = None
) -> list[OwnValue]:
    """The new values of products, fitted on a text; the model is as before afterwards."""
    model, options = fitting.loaded.model, fitting.options
    refuse_quantized(model)
    layers = layer_modules(model)
    places = _places(fitting, layers)
    if not places:
        return []
    return refitted(
        model,
        text,
        layers,
        replaced or dict.fromkeys(fitting.names, NOTHING),
        places,
        batch_size=options.batch_size,
        progress=fitting.progress,
    )


def _replaced(
    fitting: Fitting,
) -> tuple[dict[SublayerRef, BranchReplacement], Mapping[SublayerRef, Fit]]:
    """What takes the places of branches that no product before them makes up for, if asked for."""
    kind, layers = fitting.options.replacements, layer_modules(fitting.loaded.model)
    replacements: dict[SublayerRef, BranchReplacement] = dict.fromkeys(fitting.names, NOTHING)
    if kind == "none":
        return replacements, {}
    places, _ = places_of(fitting.loaded.model, layers, fitting.names)
    without = [ref for ref in fitting.names if all(ref not in place.gap for place in places)]
    if not without:
        return replacements, {}
    replaced, fits = replace(fitting, names=without).alike(kind)
    for ref in without:
        what = "nothing" if replaced[ref] is NOTHING else kind
        fitting.progress.say(f"heal: {ref}: no weight to fold into; in its place: {what}")
    return replacements | replaced, fits


def _places(fitting: Fitting, layers: Sequence[LayerModules]) -> list[Place]:
    """The products to fold into; says which kept branches have none."""
    model = fitting.loaded.model
    places, without = places_of(model, layers, fitting.names)
    if not places and fitting.options.replacements == "none":
        raise HealingError(
            f"{type(model).__name__} has no kept branch before a gap, or behind it, that ends in a "
            "product of its own: a norm (behind each sum, too) or experts stand there, other "
            "modules read its weight, or nothing is kept.",
            "Use separate maps: --heal linear, or replacements: linear in a --config file.",
            code="nothing-to-fold-into",
        )
    if without:
        named = ", ".join(f"{ref.kind} {ref.layer}" for ref in without)
        fitting.progress.say(f"heal: {named}: no weight of their own to fold into")
    return places


def _refuse_loss(
    fitting: Fitting,
    text: CalibrationText,
    replaced: BranchReplacements,
    values: Sequence[OwnValue],
) -> None:
    """Refuses a fold that is no better than the bare cut on text that it wasn't fitted on."""
    if values or any(what is not NOTHING for what in replaced.values()):
        cut: Any = dict.fromkeys(fitting.names, NOTHING)
        meter = meter_here(fitting.loaded, text, fitting.options.batch_size, positions=1)
        bare = meter.measure(cut, fitting.progress)
        healed = meter.inside(lambda: swapped(values)).measure(replaced, fitting.progress)
        if healed.distance < bare.distance:
            return
    raise HealingError(
        f"Folding gained nothing on held-out samples of {text.ref.source}.",
        "Give more to calibrate on (--samples), or heal with --heal linear or distill.",
        code="healing-gained-nothing",
    )

"""Where a fold can go: the last products of kept branches, and the gaps that follow them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.models.architectures import SublayerModules, sublayers_of
from exporter.models.changed_weights import is_product
from exporter.models.residual_stream import (
    LayerModules,
    first_tensor,
    hooked,
    probe_inputs,
    run_backbone,
)
from graph_passes.types import SublayerRef

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
    parts = {part.ref: part for part in sublayers_of(layers)}
    runs = [*_runs(layers, cut)]
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


@dataclass(frozen=True)
class _Run:
    """A kept branch and the gap behind it; None kept before the first one."""

    kept: SublayerRef | None
    until: SublayerRef
    gap: tuple[SublayerRef, ...]


def _runs(layers: Sequence[LayerModules], cut: Collection[SublayerRef]) -> Iterator[_Run]:
    """Of branches that read the same stream the last kept one."""
    kept_now: SublayerRef | None = None
    gap_now: tuple[SublayerRef, ...] = ()
    until: SublayerRef | None = None
    for group in _groups(layers):
        kept = [ref for ref in group if ref not in cut]
        gap = tuple(ref for ref in group if ref in cut)
        if kept:
            if until is not None:
                yield _Run(kept_now, until, gap_now)
            kept_now, gap_now = kept[-1], gap
        else:
            gap_now += gap
        until = group[-1]
    if until is not None:
        yield _Run(kept_now, until, gap_now)


def _groups(layers: Sequence[LayerModules]) -> Iterator[tuple[SublayerRef, ...]]:
    """The branches that read the same stream."""
    for modules in layers:
        attention = SublayerRef(modules.number, "attention")
        mlp = SublayerRef(modules.number, "mlp")
        if modules.form == "parallel":
            yield attention, mlp
        else:
            yield (attention,)
            yield (mlp,)


def products_of(
    model: Any, parts: Sequence[SublayerModules]
) -> dict[SublayerRef, tuple[str, torch.nn.Module]]:
    """The product that gives what a branch adds, as a few tokens show; a weight of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    uses = Counter(id(item) for _, item in model.named_parameters(remove_duplicate=False))
    results: dict[SublayerRef, tuple[str, torch.nn.Module]] = {}
    outputs: dict[int, torch.Tensor] = {}

    def keep(module: Any, _inputs: Any, output: Any) -> None:
        outputs[id(module)] = first_tensor(output).clone()

    def look(part: SublayerModules, products: Any, _module: Any, _in: Any, output: Any) -> None:
        for product in products:
            if _are_alike(outputs.get(id(product)), first_tensor(output)):
                results[part.ref] = names[id(product)], product

    def hooks() -> Iterator[Any]:
        for part in parts:
            inside = [item for item in part.contribution.modules() if is_product(item)]
            own = [item for item in inside if uses[id(item.weight)] == 1]
            yield from (item.register_forward_hook(keep) for item in own)
            yield part.contribution.register_forward_hook(partial(look, part, own))

    with hooked(hooks()):
        run_backbone(model, probe_inputs(model))
    return results


def _are_alike(given: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    if given is None or given.numel() != wanted.numel():
        return False
    return bool((given.reshape(wanted.shape) == wanted).all())

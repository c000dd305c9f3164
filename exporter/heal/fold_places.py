"""Where a fold can go: the last products of kept branches, and the gaps that follow them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced
from exporter.models.architectures import SublayerModules, sublayers_of
from exporter.models.changed_weights import is_product
from exporter.models.residual_stream import (
    LayerModules,
    LayerStates,
    first_tensor,
    hooked,
    probe_inputs,
    run_backbone,
    tapped,
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


_TOLERANCE = 0.02
"""How far a token's stream may be from its double, relative to its length: a norm's epsilon."""


@dataclass(frozen=True, eq=False)
class Writer:
    """A parameter that the stream is proportional to, with the others."""

    ref: SublayerRef | None  # the branch whose last product has it; None: an embedding
    name: str
    parameter: torch.nn.Parameter


def writers_of(
    model: Any,
    layers: Sequence[LayerModules],
    cut: Collection[SublayerRef],
    places: Sequence[Place],
) -> list[Writer]:
    """All that writes to the stream, up to the layer of the last place.

    There are none where the embedding's weight is read elsewhere, as by the head, or a branch has
    no product of its own. The rest is shown by doubling them all: every token's stream in the cut
    model must double. A norm behind the embedding keeps it from that.
    """
    last = places[-1].part.layer
    parts = [p for p in sublayers_of(layers) if p.layer <= last and p.ref not in cut]
    products = products_of(model, parts)
    if len(products) < len(parts):
        return []
    writers = [*embeddings_of(model)]
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if not any(writer.parameter is embedding for writer in writers):
        return []
    for ref, (name, product) in products.items():
        named = product.named_parameters(prefix=name, recurse=False)
        writers += (Writer(ref, item, parameter) for item, parameter in named)
    return writers if _double(model, layers[last], cut, writers) else []


def embeddings_of(model: Any) -> Iterator[Writer]:
    """Those whose weight nothing else reads."""
    import torch

    uses = Counter(id(item) for _, item in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and uses[id(module.weight)] == 1:
            yield Writer(None, f"{name}.weight", module.get_parameter("weight"))


def _double(
    model: Any, layer: LayerModules, cut: Collection[SublayerRef], writers: Sequence[Writer]
) -> bool:
    """Whether each token's stream behind a layer doubles with all writers."""
    import torch

    def stream() -> torch.Tensor:
        states: list[LayerStates] = []
        with branches_replaced(model, dict.fromkeys(cut, NOTHING)), tapped([layer], states.append):
            run_backbone(model, probe_inputs(model))
        return states[0].leaving

    wanted = 2 * stream()
    with torch.no_grad(), _doubled(writers):
        off = stream() - wanted
    return bool((off.norm(dim=-1) <= _TOLERANCE * wanted.norm(dim=-1)).all())


@contextlib.contextmanager
def _doubled(writers: Sequence[Writer]) -> Iterator[None]:
    """Doubles parameters in place while the block runs; halving them again loses nothing."""
    for writer in writers:
        writer.parameter.data.mul_(2)
    try:
        yield
    finally:
        for writer in writers:
            writer.parameter.data.mul_(0.5)

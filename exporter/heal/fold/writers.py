"""What writes to the residual stream: a factor on all of it is a factor on the stream.

Branches read the stream behind a norm, and a norm takes a factor away, but for its epsilon. So the
stream before a gap is multiplied by multiplying the embeddings and the last products of all kept
branches before the gap, and nothing else changes there.
Source: Prune&Comp (arXiv 2507.18212) folds the magnitude that a dropped block added in this way.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.heal.fold.places import Place, products_of
from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced
from exporter.models.anatomy.architectures import sublayers_of
from exporter.models.anatomy.residual_stream import (
    LayerModules,
    LayerStates,
    probe_inputs,
    run_backbone,
    tapped,
)
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch

_TOLERANCE = 0.02
"""How far a token's stream may be from its double, relative to its length: a norm's epsilon."""


@dataclass(frozen=True, eq=False)
class Writer:
    """A parameter that the stream is proportional to, with the others.

    Attributes:
        ref: The branch whose last product has it; None: an embedding.
        name: In the model.
        parameter: The model's.
    """

    ref: SublayerRef | None
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

    Args:
        model: A transformers model; it is as before afterwards.
        layers: The model's.
        cut: The branches that are dropped.
        places: The products before gaps, in the layers' order.
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
        writers += (Writer(ref, each, parameter) for each, parameter in named)
    return writers if _double(model, layers[last], cut, writers) else []


def embeddings_of(model: Any) -> Iterator[Writer]:
    """Those whose weight nothing else reads."""
    import torch

    uses = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and uses[id(module.weight)] == 1:
            yield Writer(None, f"{name}.weight", module.get_parameter("weight"))


def _double(
    model: Any, layer: LayerModules, cut: Collection[SublayerRef], writers: Sequence[Writer]
) -> bool:
    """Whether each token's stream behind a layer doubles with all writers."""
    import torch

    def stream() -> torch.Tensor:
        found: list[LayerStates] = []
        with branches_replaced(model, dict.fromkeys(cut, NOTHING)), tapped([layer], found.append):
            run_backbone(model, probe_inputs(model))
        return found[0].leaving

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

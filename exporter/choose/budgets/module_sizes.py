"""What sublayers weigh by a model's modules alone, where no graph of it is at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from exporter.choose.costs.graph_sizes import GraphSizes, SublayerSize
from exporter.models.anatomy.architectures import SublayerModules, layer_modules, sublayers
from exporter.models.loading.model_source import LoadedModel


def module_sizes(loaded: LoadedModel) -> GraphSizes:
    """Weighs the modules of every attention and MLP, without their norms and caches.

    A cut takes the norms too: it removes a few thousandths more than this says. Weights that
    several modules share belong to none of them.

    Args:
        loaded: The model.

    Raises:
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    owners = {each.number: each.layer for each in layer_modules(loaded.model)}
    uses = Counter(id(p) for m in loaded.model.modules() for p in m._parameters.values())
    everything = list(loaded.model.parameters())
    width = loaded.model.config.get_text_config().hidden_size
    return GraphSizes(
        sublayers={
            part.ref: _size(_own(part, owners[part.layer]), uses)
            for part in sublayers(loaded.model)
        },
        parameters=sum(p.numel() for p in everything),
        weight_bytes=sum(p.numel() * p.element_size() for p in everything),
        hidden=width,
        number_bytes=everything[0].element_size(),
        name=loaded.ref.source,
    )


def _own(part: SublayerModules, layer: Any) -> Iterable[Any]:
    """The parameters of the layer's children that the branch goes through."""
    inside = (part.contribution, part.reads)
    children = [
        child for child in layer.children() if any(m is s for m in child.modules() for s in inside)
    ]
    return [parameter for child in children for parameter in child.parameters()]


def _size(parameters: Iterable[Any], uses: Counter[int]) -> SublayerSize:
    alone = [p for p in parameters if uses[id(p)] == 1]
    numbers = sum(p.numel() for p in alone)
    held = sum(p.numel() * p.element_size() for p in alone)
    return SublayerSize(numbers, numbers, held, held)

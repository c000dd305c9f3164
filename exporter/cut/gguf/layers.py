"""What a plan leaves of each layer of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.artifacts import PlannedDeletion
from exporter.errors import SurgeryError
from exporter.models.gguf.header import Tensor
from exporter.models.gguf.model_files import GgufModel
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerRef

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)")


@dataclass(frozen=True)
class Layer:
    """One layer that stays, whole or in part.

    Attributes:
        number: In the file that is cut.
        attention: What takes the attention's place; None: it stays.
        mlp: What takes the MLP's place; None: it stays.
    """

    number: int
    attention: Replacement | None = None
    mlp: Replacement | None = None

    @property
    def whole(self) -> bool:
        """Whether all of it stays."""
        return self.attention is None and self.mlp is None


def layers_left(deletions: Sequence[PlannedDeletion], count: int) -> list[Layer]:
    """The layers that stay. One whose attention and MLP both go without replacement is gone.

    Args:
        deletions: A plan's that was held against the number of layers.
        count: How many layers there are.
    """
    gone: dict[tuple[int, str], Replacement] = {}
    for each in deletions:
        if each.kind not in (*BLOCK_KINDS, "block"):
            raise SurgeryError(
                f"{each.kind} {each.layer} is to go, but in a GGUF file only attentions, MLPs and "
                "blocks are known.",
                "Make a plan of those: depthcut plan.",
                code="kind-unknown-here",
            )
        gone.update({(ref.layer, ref.kind): each.replacement for ref in each.sublayers})
    layers = [Layer(n, gone.get((n, "attention")), gone.get((n, "mlp"))) for n in range(count)]
    return [each for each in layers if (each.attention, each.mlp) != ("none", "none")]


def refuse_missing(model: GgufModel, deletions: Sequence[PlannedDeletion]) -> None:
    """Refuses a plan that drops what the file lacks, as one has that was cut by another program."""
    parts = sublayers_of(model)
    for ref in (ref for each in deletions for ref in each.sublayers):
        if ref not in parts:
            raise SurgeryError(
                f"{ref} is to go, and {model.path} has no tensors of it.",
                "Take it out of the plan.",
                code="sublayer-missing",
            )


def sublayers_of(model: GgufModel) -> dict[SublayerRef, list[Tensor]]:
    """The tensors of each attention and MLP, by layer."""
    found: dict[SublayerRef, list[Tensor]] = {}
    for tensor in model.tensors:
        ref = _sublayer_of(tensor.name)
        if ref is not None:
            found.setdefault(ref, []).append(tensor)
    return dict(sorted(found.items()))


def _sublayer_of(name: str) -> SublayerRef | None:
    """The sublayer that a tensor belongs to; None: it is in no layer."""
    place = place_in_layer(name)
    if place is None:
        return None
    return SublayerRef(place[0], "attention" if place[1].startswith("attn_") else "mlp")


def place_in_layer(name: str) -> tuple[int, str] | None:
    """A tensor's layer and its name there, such as ``attn_q.weight``; None: it is in no layer."""
    told = _LAYER.fullmatch(name)
    return None if told is None else (int(told[1]), told[2])


def new_numbers(layers: Sequence[Layer]) -> Mapping[int, int]:
    """From the number of each layer that stays to its new one."""
    return {layer.number: place for place, layer in enumerate(layers)}

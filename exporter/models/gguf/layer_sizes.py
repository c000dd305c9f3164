"""What a GGUF file's metadata say of each of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.errors import SurgeryError
from exporter.models.gguf.header import broken
from exporter.models.gguf.model_files import GgufModel
from graph_passes.types import MOST_LAYERS

BLOCK_COUNT = "block_count"
HIDDEN = "embedding_length"
HEADS, KV_HEADS, MLP_WIDTH = (
    "attention.head_count", "attention.head_count_kv", "feed_forward_length",
)  # fmt: skip
_MOST = 1 << 31


@dataclass(frozen=True)
class LayerSizes:
    """What a layer of a Llama consists of.

    Attributes:
        heads: Of its attention; 0 without one.
        kv_heads: Of its keys and values.
        width: Of its MLP.
    """

    heads: int
    kv_heads: int
    width: int


def layers_of(model: GgufModel) -> int:
    """How many layers a file has."""
    count = model.whole(BLOCK_COUNT)
    if not 0 < count <= MOST_LAYERS:
        entry = f"{model.architecture}.{BLOCK_COUNT}"
        told = f"{entry} is {count}, and no model has more than {MOST_LAYERS} layers"
        raise broken(model.path, told, "layer-count")
    return count


def sizes_of(model: GgufModel) -> list[LayerSizes]:
    """What each layer of the file consists of."""
    heads = _of_layers(model, HEADS)
    kv_heads = heads if model.entry(KV_HEADS) is None else _of_layers(model, KV_HEADS)
    widths = _of_layers(model, MLP_WIDTH)
    return [LayerSizes(*each) for each in zip(heads, kv_heads, widths, strict=True)]


def _of_layers(model: GgufModel, name: str) -> list[int]:
    """One whole number for each layer: an array's, or the same for all."""
    count, entry = layers_of(model), model.entry(name)
    if entry is None or entry.length is None:
        numbers = [model.whole(name)] * count
    else:  # an array of another length may be a huge one
        numbers = (entry.wholes or []) if entry.length == count else []
    if len(numbers) != count or not 0 <= min(numbers) <= max(numbers) < _MOST:
        raise SurgeryError(
            f"{model.path}: {model.architecture}.{name} is not a whole number from 0 to "
            f"{_MOST - 1}, nor one for each of the {count} layers.",
            "It may be broken: fetch or write it again.",
            code="wrong-array",
        )
    return numbers

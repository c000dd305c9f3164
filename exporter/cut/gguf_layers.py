"""What a plan leaves of each layer of a GGUF file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from exporter.artifacts import PlannedDeletion
from exporter.errors import SurgeryError
from exporter.models.gguf_header import Entry, Tensor, array_entry, whole_entry
from exporter.models.gguf_model_files import BLOCK_COUNT, GgufModel
from graph_passes.types import Replacement, SublayerRef

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)")


@dataclass(frozen=True)
class Layer:
    """One layer that stays, whole or in part."""

    number: int
    attention: Replacement | None = None  # what takes the attention's place; None: it stays
    mlp: Replacement | None = None  # what takes the MLP's place; None: it stays

    @property
    def whole(self) -> bool:
        """Whether all of it stays."""
        return self.attention is None and self.mlp is None


def layers_left(deletions: Sequence[PlannedDeletion], count: int) -> list[Layer]:
    """The layers that stay. One whose attention and MLP both go without replacement is gone."""
    gone: dict[tuple[int, str], Replacement] = {}
    for deletion in deletions:
        gone.update({(ref.layer, ref.kind): deletion.replacement for ref in deletion.sublayers})
    layers = [Layer(n, gone.get((n, "attention")), gone.get((n, "mlp"))) for n in range(count)]
    return [layer for layer in layers if (layer.attention, layer.mlp) != ("none", "none")]


def sublayers_of(model: GgufModel) -> dict[SublayerRef, list[Tensor]]:
    """The tensors of each attention and MLP, by layer."""
    tensors: dict[SublayerRef, list[Tensor]] = {}
    for tensor in model.tensors:
        ref = _sublayer_of(tensor.name)
        if ref is not None:
            tensors.setdefault(ref, []).append(tensor)
    return dict(sorted(tensors.items()))


def _sublayer_of(name: str) -> SublayerRef | None:
    """The sublayer that a tensor belongs to; None: it is in no layer."""
    place = place_in_layer(name)
    if place is None:
        return None
    return SublayerRef(place[0], "attention" if place[1].startswith("attn_") else "mlp")


def place_in_layer(name: str) -> tuple[int, str] | None:
    """A tensor's layer and its name there, such as ``attn_q.weight``; None: it is in no layer."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def new_numbers(layers: Sequence[Layer]) -> Mapping[int, int]:
    """From the number of each layer that stays to its new one."""
    return {layer.number: place for place, layer in enumerate(layers)}


_ALIKE = (
    "llama", "deci", "mistral3", "qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "phi2",
    "phi3", "command-r", "olmo", "olmoe", "starcoder", "starcoder2", "stablelm", "internlm2",
    "granite", "granitemoe", "falcon", "gptneox", "gpt2", "bloom", "mpt", "nemotron", "arcee",
    "seed_oss", "xverse", "exaone", "orion", "dream", "minicpm", "bert", "nomic-bert",
)  # fmt: skip
_PERIODS = {
    **dict.fromkeys(_ALIKE, 1),
    "gemma2": 2,
    "gpt-oss": 2,
    "modern-bert": 3,
    "cohere2": 4,
    "olmo2": 4,
    "smollm3": 4,
    "gemma3": 6,
}
# llama.cpp takes these from the number of layers, or from layers' numbers, where they aren't said.
_NEEDED = {"minicpm": "residual_scale"}
_SIZED = {"gemma2": 46, "gemma3": 62}  # with so many layers llama.cpp scales attention otherwise
_TELLING = ("moe_every_n_layers", "interleave_moe_layer_step", "leading_dense_block_count")
_PER_LAYER = frozenset(
    {
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "expert_used_count",
        "expert_feed_forward_length",
    }
)
_WAY_OUT = "Cut the ONNX graph (depthcut prune), or the checkpoint before its conversion."


def check_own(model: GgufModel, layers: Sequence[Layer]) -> None:
    """Refuses fewer layers where llama.cpp would compute something else with them."""
    for reason in _unread(model, layers):
        raise SurgeryError(f"{model.path}: {reason}", _WAY_OUT, code="unread-architecture")


def _unread(model: GgufModel, layers: Sequence[Layer]) -> Iterator[str]:
    architecture = model.architecture
    period, sized = _PERIODS.get(architecture), _SIZED.get(architecture)
    needed = _NEEDED.get(architecture)
    if period is None:
        yield f"whether llama.cpp treats all layers of {architecture} alike was not looked at."
    if needed is not None and model.entry(needed) is None:
        yield f"without {architecture}.{needed} llama.cpp makes that from the number of layers."
    if sized in (model.whole(BLOCK_COUNT), len(layers)):
        yield (
            f"{len(layers)} layers would be left; llama.cpp scales the attention of {architecture} "
            f"otherwise with {sized} layers than with any other number."
        )
    if (telling := model.said(_TELLING)) is not None:
        yield f"{telling.key} tells some layers from the rest by their numbers."
    entry = model.entry("attention.sliding_window_pattern")
    every = math.lcm(period or 1, (entry and entry.whole) or 1)
    for place, layer in enumerate(layers):
        if (layer.number - place) % every:
            yield (
                f"without the blocks before it layer {layer.number} would become layer {place}. "
                f"llama.cpp treats every {every} layers of {architecture} by their numbers, so it "
                f"would be computed as another kind of layer: take out {every} blocks in a row, or "
                "a multiple of that."
            )


def own_entries(model: GgufModel, layers: Sequence[Layer]) -> list[Entry]:
    """The metadata for fewer layers."""
    return list(_own_entries(model, layers))


def _own_entries(model: GgufModel, layers: Sequence[Layer]) -> Iterator[Entry]:
    prefix, count = f"{model.architecture}.", model.whole(BLOCK_COUNT)
    for entry in model.entries.values():
        name = entry.key.removeprefix(prefix)
        if name == entry.key:
            yield entry
        elif name == BLOCK_COUNT:
            yield whole_entry(entry.key, len(layers))
        elif entry.length == count:
            yield _of_layers(model, entry, name, layers)
        else:
            yield entry


def _of_layers(model: GgufModel, entry: Entry, name: str, layers: Sequence[Layer]) -> Entry:
    """An array with a value a layer, for the layers that stay."""
    elements, kind = entry.elements, entry.element_kind
    if name not in _PER_LAYER or elements is None or kind is None:
        raise SurgeryError(
            f"{model.path}: {entry.key} has as many values as the model has layers, and what they "
            "are for is not known here.",
            _WAY_OUT,
            code="unread-architecture",
        )
    return array_entry(entry.key, kind, [elements[layer.number] for layer in layers])

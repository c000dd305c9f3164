"""Fewer layers in a file's own architecture, where llama.cpp treats all layers alike.

llama.cpp tells some layers from others by their numbers: windows, layers without positions, dense
and sparse ones. Such a pattern has a period, and a layer may only move by a multiple of it. The
periods are read in llama.cpp's ``src/models/*.cpp``; an architecture that isn't here was not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from exporter.cut.gguf.layers import Layer
from exporter.errors import SurgeryError
from exporter.models.gguf.header import Entry, array_entry, whole_entry
from exporter.models.gguf.layer_sizes import BLOCK_COUNT
from exporter.models.gguf.model_files import GgufModel

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
    architecture = model.architecture
    period = _PERIODS.get(architecture)
    if period is None:
        raise SurgeryError(
            f"{model.path} is of the architecture {architecture}; whether llama.cpp treats all its "
            "layers alike was not looked at, so none is taken out.",
            _WAY_OUT,
            code="unread-architecture",
        )
    told = model.entry("attention.sliding_window_pattern")
    period = math.lcm(period, (told and told.whole) or 1)
    _refuse_what_tells_layers(model, layers)
    for place, layer in enumerate(layers):
        if (layer.number - place) % period:
            raise SurgeryError(
                f"{model.path}: without the blocks before it layer {layer.number} would become "
                f"layer {place}. llama.cpp treats every {period} layers of {architecture} by their "
                f"numbers, so it would be computed as another kind of layer.",
                f"Take out {period} blocks in a row, or a multiple of that. {_WAY_OUT}",
                code="pattern-of-layers",
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
            code="unknown-array",
        )
    return array_entry(entry.key, kind, [elements[layer.number] for layer in layers])


def _refuse_what_tells_layers(model: GgufModel, layers: Sequence[Layer]) -> None:
    needed = _NEEDED.get(model.architecture)
    if needed is not None and model.entry(needed) is None:
        raise SurgeryError(
            f"{model.path} has no {model.architecture}.{needed}, which llama.cpp then makes from "
            "the number of layers.",
            _WAY_OUT,
            code="made-of-layer-count",
        )
    sized = _SIZED.get(model.architecture)
    if sized in (model.whole(BLOCK_COUNT), len(layers)):
        raise SurgeryError(
            f"{model.path} would have {len(layers)} layers; llama.cpp scales the attention of "
            f"{model.architecture} otherwise with {sized} layers than with any other number.",
            _WAY_OUT,
            code="made-of-layer-count",
        )
    telling = model.said(_TELLING)
    if telling is not None:
        raise SurgeryError(
            f"{model.path}: {telling.key} tells some layers from the rest by their numbers.",
            _WAY_OUT,
            code="pattern-of-layers",
        )

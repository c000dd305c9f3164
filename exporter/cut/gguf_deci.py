"""Layers without their attention or MLP, as llama.cpp's architecture ``deci`` has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from exporter.cut.gguf_layers import Layer
from exporter.errors import SurgeryError
from exporter.models.gguf_header import Entry, text_entry, whole_entry, wholes_entry
from exporter.models.gguf_model_files import (
    ARCHITECTURE_KEY,
    BLOCK_COUNT,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLP_WIDTH,
    GgufModel,
    LayerSizes,
    sizes_of,
)

DECI = "deci"
ZERO_WIDTH = 32
"""How wide an MLP of zeros is: kernels want whole blocks of 32."""

_HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_REWRITTEN = (BLOCK_COUNT, HEADS, KV_HEADS, MLP_WIDTH, *_HEAD_WIDTHS)
ALIKE = ("llama", DECI)
"""What llama.cpp computes as ``deci``."""
_IN_LAYER = re.compile(
    r"(attn_norm|ffn_norm)\.weight|(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.(weight|bias)"
)
_OUTSIDE = frozenset(
    {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    }
)
_NORMS = ("attn_norm.weight", "ffn_norm.weight")
_MOST = 1 << 31
_EXPERTS = ("expert_count", "expert_used_count")
_BLOCKS = "Whole blocks can go from it: plan with --drop-block."


def check_deci(model: GgufModel, layers: Sequence[Layer]) -> None:
    """Raises where llama.cpp would compute the result wrongly, or not load it, as ``deci``."""
    for reason, hint in _unheld(model, layers):
        raise SurgeryError(f"{model.path}: {reason}", hint, code="unread-architecture")
    check_heads(model, layers)


def _unheld(model: GgufModel, layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """What ``deci`` doesn't compute, and what to do."""
    first = next(layer for layer in layers if not layer.whole)
    if model.architecture not in ALIKE:
        what = f"{'attention' if first.attention else 'mlp'} {first.number}"
        yield (
            f"{what} is to go, and the file is of the architecture {model.architecture}. llama.cpp "
            f"has layers without attention only in {DECI}, which computes as {ALIKE[0]} does.",
            f"{_BLOCKS} The ONNX graph can be cut as planned: depthcut prune.",
        )
    if (entry := model.said(_EXPERTS)) is not None:
        yield f"it has experts ({entry.key}), which {DECI} doesn't compute.", _BLOCKS
    hidden = model.whole(HIDDEN)
    for tensor in model.tensors:
        name = re.sub(r"^blk\.[0-9]+\.", "", tensor.name)
        outside = name == tensor.name
        if not (name in _OUTSIDE if outside else _IN_LAYER.fullmatch(name)):
            yield f"{DECI} of llama.cpp doesn't read its tensor {tensor.name}.", _BLOCKS
        if name in _NORMS and (tensor.shape, tensor.kind_name) != ((hidden,), "F32"):
            yield (
                f"{tensor.name} has the shape {list(tensor.shape)} in {tensor.kind_name}; "
                f"{model.architecture}.{HIDDEN} wants [{hidden}] in F32.",
                "It may be broken: fetch or write it again.",
            )
    for layer in layers:
        places = {"attention": layer.attention, "mlp": layer.mlp}
        for kind, place in places.items():
            if place not in (None, "none") and (kind, place) != ("attention", "linear"):
                yield (
                    f"{kind} {layer.number} is to be replaced ({place}); {DECI} can hold a linear "
                    "map without intercept in place of an attention, and else nothing.",
                    "Heal the plan for it: depthcut heal --for llama.cpp.",
                )


def deci_entries(model: GgufModel, layers: Sequence[Layer]) -> list[Entry]:
    """The metadata as ``deci`` has it."""
    sizes = sizes_of(model)
    return [*_kept_entries(model), *_layer_entries(model, layers, sizes)]


def left_of(size: LayerSizes, layer: Layer) -> LayerSizes:
    """What a cut leaves of a layer."""
    if layer.attention is not None:
        size = replace(size, heads=size.heads if layer.attention == "linear" else 0, kv_heads=0)
    return size if layer.mlp is None else replace(size, width=ZERO_WIDTH)


def _kept_entries(model: GgufModel) -> Iterator[Entry]:
    """All that isn't told layer by layer, under the new architecture's name."""
    prefix = f"{model.architecture}."
    for entry in model.entries.values():
        name = entry.key.removeprefix(prefix)
        if entry.key == ARCHITECTURE_KEY:
            yield text_entry(entry.key, DECI)
        elif name == entry.key:
            yield entry
        elif name not in _REWRITTEN:
            yield replace(entry, key=f"{DECI}.{name}")


def _layer_entries(
    model: GgufModel, layers: Sequence[Layer], sizes: Sequence[LayerSizes]
) -> Iterator[Entry]:
    left = [left_of(sizes[layer.number], layer) for layer in layers]
    yield whole_entry(f"{DECI}.{BLOCK_COUNT}", len(layers))
    yield wholes_entry(f"{DECI}.{HEADS}", [item.heads for item in left])
    yield wholes_entry(f"{DECI}.{KV_HEADS}", [item.kv_heads for item in left])
    yield wholes_entry(f"{DECI}.{MLP_WIDTH}", [item.width for item in left])
    for name in _HEAD_WIDTHS:
        yield whole_entry(f"{DECI}.{name}", _head_width(model, sizes))


def _head_width(model: GgufModel, sizes: Sequence[LayerSizes]) -> int:
    """The width of a head, which must be one, and whose positions are all of it."""
    usual = model.whole(HIDDEN) // max(sizes[0].heads, 1)
    said = [model.whole(name) for name in _HEAD_WIDTHS if model.entry(name) is not None]
    numbers = {*said} if len(said) == len(_HEAD_WIDTHS) else {usual, *said}
    if len(numbers) > 1 or not all(0 < number < _MOST for number in numbers):
        raise SurgeryError(
            f"{model.path}: {', '.join(_HEAD_WIDTHS)} are {sorted(numbers)}; {DECI} has one width.",
            _BLOCKS,
            code="unread-architecture",
        )
    return numbers.pop()


def check_heads(model: GgufModel, layers: Sequence[Layer]) -> None:
    """Refuses a cut whose first layer has no heads, or that leaves no attention."""
    first = layers[0]
    sizes = sizes_of(model)
    if left_of(sizes[first.number], first).heads == 0:
        missing = first.attention is None
        raise SurgeryError(
            f"attention {first.number} {'is missing' if missing else 'is to go'} from the first "
            "layer that stays; llama.cpp takes the width of all heads from layer 0, and loads no "
            "file in which that has none.",
            "Keep the blocks before it."
            if missing
            else f"Keep it: plan with --protect attention:{first.number}, or --for llama.cpp.",
            code="no-attention-left",
        )
    if not any(left_of(sizes[layer.number], layer).kv_heads for layer in layers):
        raise SurgeryError(
            f"No attention of {model.path} stays; llama.cpp wants at least one.",
            "Keep one in the plan.",
            code="no-attention-left",
        )

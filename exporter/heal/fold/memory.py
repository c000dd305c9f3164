"""How much memory folding takes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from exporter.errors import HealingError
from exporter.heal.fold.places import products_of
from exporter.heal.fold.writers import embeddings_of
from exporter.models.anatomy.architectures import layer_modules, sublayers_of
from exporter.models.texts.calibration import DEFAULT_TOKENS
from exporter.processes import available_bytes
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch

    from exporter.heal.options import HealOptions

_SQUARES, _MAPS = 6, 5
"""Matrices of inputs by inputs, and by outputs, in float64, that a ridge is chosen with."""
_STREAMS = 3


def folding_bytes(
    model: Any, options: HealOptions, cut: Collection[SublayerRef]
) -> tuple[int, int]:
    """What stays of a fold, and what it takes besides, at the most, in bytes."""
    layers = layer_modules(model)
    parts = [part for part in sublayers_of(layers) if part.ref not in cut]
    products: list[Any] = [product for _, product in products_of(model, parts).values()]
    if not products or layers[0].form == "post_norm":
        return 0, 0
    width, size = model.config.get_text_config().hidden_size, model.dtype.itemsize
    numbers = sorted(map(_own_numbers, products), reverse=True)
    embeddings = [writer.parameter for writer in embeddings_of(model)]
    read = getattr(model.get_input_embeddings(), "weight", None)
    has_factors = len(products) == len(parts) and any(each is read for each in embeddings)
    places = len(cut) or len(products)
    changed = sum(numbers[:places])
    if has_factors:
        changed = sum(numbers) + sum(each.numel() for each in embeddings)
    inputs, outputs = numbers[0] // width, width * (3 if has_factors else 1)
    tokens = options.batch_size * options.sequence_length
    fitting = 8 * inputs * (_SQUARES * inputs + _MAPS * outputs)
    working = fitting + 2 * tokens * (inputs + outputs) * 8
    maps = 4 * sum(numbers[:places])
    return changed * size, working + maps + _STREAMS * DEFAULT_TOKENS * width * size


def _own_numbers(module: Any) -> int:
    return sum(each.numel() for each in module.parameters(recurse=False))


def refuse_short_memory(model: Any, options: HealOptions, cut: Collection[SublayerRef]) -> None:
    """Refuses to fold where that takes more memory than is free.

    Raises:
        HealingError: It does.
    """
    needed, free = sum(folding_bytes(model, options, cut)), free_bytes(model.device)
    if free is not None and needed > free:
        raise HealingError(
            f"Folding takes about {gigabytes(needed)} GB of memory beside the weights, but "
            f"{gigabytes(free)} are free.",
            "Free memory, or heal with --heal bias; a smaller --sequence-length saves little.",
            code="out-of-memory",
        )


def free_bytes(device: torch.device) -> int | None:
    """What is free there; None where that isn't known."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


def gigabytes(size: int) -> str:
    """A size in bytes as a number of gigabytes, in words."""
    return f"{size / 1e9:.1f}"

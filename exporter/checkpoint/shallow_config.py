"""A model's config with fewer layers, and every list in it that has an entry a layer. No PyTorch.

What a config says by a rule instead of a list, such as "every fourth layer", can't be said of other
layers; :mod:`exporter.checkpoint.shallow_model` looks whether each layer came out as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exporter.artifacts.plans.dialects.per_layer_config import KEY as PER_LAYER

# Lists whose length may be that of the layers by chance.
_OTHER_LISTS = ("architectures", "mrope_section")
_OTHER_ENDS = ("_token_id", "_token_ids", "_tokens")
_NUMBERED = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "dense_layers")
"""Lists of layers' numbers."""
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index")
"""Numbers of layers at the beginning."""


def shallow_config(
    config: Mapping[str, Any], kept: Sequence[int], layers: int, layers_key: str
) -> dict[str, Any]:
    """The config of the same model with some of its layers, numbered anew.

    Args:
        config: As JSON: the part that has ``layers_key``.
        kept: The layers that stay, in order.
        layers: How many there are.
        layers_key: What the config calls that number.
    """
    shallow = {
        key: [value[layer] for layer in kept] if _has_entry_a_layer(key, value, layers) else value
        for key, value in config.items()
    }
    place = {layer: number for number, layer in enumerate(kept)}
    for key in _NUMBERED:
        if isinstance(config.get(key), list):
            shallow[key] = [place[layer] for layer in config[key] if layer in place]
    for key in _FIRST_LAYERS:
        first = config.get(key)
        if isinstance(first, int) and not isinstance(first, bool):
            shallow[key] = sum(layer < first for layer in kept)
    if isinstance(config.get(PER_LAYER), Mapping):
        own = {int(layer): each for layer, each in config[PER_LAYER].items()}
        shallow[PER_LAYER] = {str(place[n]): own[n] for n in sorted(own) if n in place}
    return {**shallow, layers_key: len(kept)}


def _has_entry_a_layer(key: str, value: Any, layers: int) -> bool:
    if not isinstance(value, list) or len(value) != layers or key in _NUMBERED:
        return False
    return key not in _OTHER_LISTS and not key.endswith(_OTHER_ENDS)

"""Whether a model computes as Llama does, which is all that some servers compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALIKE = ("llama", "mistral")
_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size")
_WIDTH_UNIT = 256


def other_arithmetic(config: Mapping[str, Any]) -> str:
    """What of a config such servers would pass over, in words; empty where nothing is."""
    kind = config.get("model_type")
    if kind is None:
        return other_class(_first_class(config.get("architectures")))
    if kind not in _ALIKE:
        return f"its type is {kind}"
    if not all(_is_size(config.get(name)) for name in _SIZES):
        return ""
    hidden, heads, width = (config[name] for name in _SIZES)
    act, head = config.get("hidden_act", "silu"), config.get("head_dim")
    head = head if _is_size(head) else hidden // heads
    rules = (
        (act != "silu", f"its activation is {act}"),
        (bool(config.get("attention_bias")), "its attention has biases"),
        (bool(config.get("mlp_bias")), "its MLP has biases"),
        (config.get("sliding_window") is not None, "its attention has a window"),
        (head * heads != hidden, f"its heads are {head} wide, not hidden_size / heads"),
        (width % _WIDTH_UNIT != 0, f"its MLP is {width} wide, no multiple of {_WIDTH_UNIT}"),
    )
    return next((what for broken, what in rules if broken), "")


def other_class(name: str) -> str:
    """The same by what transformers calls the model's class alone."""
    return f"its class is {name}" if name and name not in _CLASSES else ""


def _first_class(names: object) -> str:
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

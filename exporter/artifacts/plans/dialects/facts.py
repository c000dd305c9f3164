"""What all dialects ask of a config: its parts, its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from exporter.errors import PlanError

TEXT_PARTS = ("text_config", "language_config", "llm_config")
"""Where a model of several kinds of input keeps its language model's config."""
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_WORDS = {int: "a number", str: "a text", dict: "an object", list: "a list", bool: "true or false"}


def nested_configs(content: Any) -> Iterator[Mapping[str, Any]]:
    """A config, and the one of the language model in it where it has others too."""
    if not isinstance(content, Mapping):
        return
    yield content
    for key in TEXT_PARTS:
        if isinstance(content.get(key), Mapping):
            yield content[key]


def layers_in(config: Mapping[str, Any]) -> int | None:
    """How many layers a config says that there are."""
    for key in _LAYER_KEYS:
        number = config.get(key)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return None


def wrong(where: str, path: str, told: str, hint: str = "") -> PlanError:
    """An error with the JSON path of what is wrong."""
    return PlanError(f"{where}: $.{path}: {told}.", hint)


def wanted(value: Any, kind: type, where: str, path: str) -> Any:
    """A value of one JSON type.

    Raises:
        PlanError: It is of another.
    """
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise wrong(where, path, f"{_WORDS[kind]} is wanted, not {value!r:.60}")

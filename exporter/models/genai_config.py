"""onnxruntime-genai's ``genai_config.json``: rewritten for a decoder with fewer layers."""

from __future__ import annotations

import copy
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import SurgeryError
from exporter.printable import json_text
from graph_passes.files.reading import read_json

CONFIG_FILE = "genai_config.json"

_DECODER_FILE = "model.decoder.filename"
_NUMBER = "%d"
_DEFAULT_FORMATS = {
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_LAYERS = ("layers", "layer_ids")
"""What lists of layers' numbers are called."""


def _unsuitable(path: Path | str, why: str) -> SurgeryError:
    return SurgeryError(
        f"{path}: {why}.",
        "Leave the config alone with --genai-config none, and write the new one by hand.",
        code="genai-config",
    )


@dataclass(frozen=True)
class GenaiConfig:
    """A ``genai_config.json`` that names an ONNX file as its decoder."""

    path: Path
    content: dict[str, Any]

    @property
    def decoder(self) -> dict[str, Any]:
        """The part about the decoder."""
        return _part(self.content, "model", "decoder")


def find_config(source: Path) -> GenaiConfig | None:
    """Reads the config beside an ONNX file, if there is one that names this file as its decoder."""
    path = source.with_name(CONFIG_FILE)
    if not path.is_file():
        return None
    content = _read(path)
    roles = [role for role, name in _file_names(content) if name == source.name]
    if not roles:
        return None
    if roles != [_DECODER_FILE]:
        other = next(role for role in roles if role != _DECODER_FILE)
        raise _unsuitable(path, f"{source.name} is {other}, not the decoder alone")
    config = GenaiConfig(path, content)
    if config.decoder.get("shared_initializers"):
        raise _unsuitable(path, "the decoder shares weights (model.decoder.shared_initializers)")
    return config


def config_target(source: Path, target: Path) -> Path:
    """Where the new config goes: under the runtime's name, unless another model has that there."""
    usual = target.with_name(CONFIG_FILE)
    named = {name for _, name in _file_names(_read(usual))} if usual.exists() else {target.name}
    free = source.parent.resolve() != target.parent.resolve() and target.name in named
    return usual if free else target.with_name(f"{target.name}.{CONFIG_FILE}")


def rewritten(
    config: GenaiConfig,
    target: str,
    caches: Iterable[str],
    gone: Iterable[str],
    renamed: Mapping[str, str],
) -> str:
    """The config for a pruned decoder, as JSON text.

    File name, ``num_hidden_layers`` and lists of layers change; everything else stays, the
    formats of the names included. ``num_hidden_layers`` loses a layer for each that has no state
    left, since the runtime takes it for the number of caches.
    """
    content = copy.deepcopy(config.content)
    decoder = _part(content, "model", "decoder")
    decoder["filename"] = target
    gone = set(gone)
    if gone or renamed:
        kept, lost = _layers(config, caches, gone, renamed)
        reason = _needs_dense(decoder)
        if reason and sorted(kept.values()) != list(range(len(kept))):
            raise SurgeryError(
                f"{config.path}: {reason}, so the caches need numbers from 0.",
                "Number the caches that stay from 0: --renumber-kv.",
                code="cache-slides",
            )
        if isinstance(decoder.get("num_hidden_layers"), int):
            decoder["num_hidden_layers"] -= len(lost)
        if isinstance(types := decoder.get("layer_types"), list):
            decoder["layer_types"] = [kind for old, kind in enumerate(types) if old not in lost]
        moved = _moved(decoder, kept)
        decoder.clear()
        decoder |= moved
    return json_text(content, indent=4)


def _layers(
    config: GenaiConfig, caches: Iterable[str], gone: set[str], renamed: Mapping[str, str]
) -> tuple[dict[int, int], set[int]]:
    """The layers that keep a state, by old and new number, and those that lost theirs."""
    inputs = _DEFAULT_FORMATS | _part(config.decoder, "inputs")
    texts = [text for text in inputs.values() if isinstance(text, str) and _NUMBER in text]
    formats = [re.compile(re.escape(text).replace(_NUMBER, "([0-9]{1,4})")) for text in texts]

    def number(name: str) -> int | None:
        matches = (pattern.fullmatch(name) for pattern in formats)
        return next((int(match[1]) for match in matches if match is not None), None)

    unnamed = [name for name in gone if number(name) is None]
    if unnamed:
        raise _unsuitable(
            config.path, f"no name in model.decoder.inputs fits the graph's {min(unnamed)}"
        )
    numbers = {name: old for name in caches if (old := number(name)) is not None}
    new = {old: number(renamed.get(name, name)) for name, old in numbers.items()
           if name not in gone}  # fmt: skip
    kept = {old: now for old, now in new.items() if now is not None}
    lost = {*numbers.values()} - kept.keys()
    if lost and "cross_past_key_names" in inputs:
        raise _unsuitable(
            config.path, "the runtime expects an encoder's keys for each layer of the decoder"
        )
    return kept, lost


def _needs_dense(decoder: dict[str, Any]) -> str:
    """Why the runtime would count the caches instead of taking the graph's numbers."""
    inputs, window = _part(decoder, "inputs"), _part(decoder, "sliding_window")
    options = _part(decoder, "session_options").get("provider_options") or []
    reasons = {
        "keys and values are stored together (past_names)": inputs.get("past_names"),
        "the cache slides (sliding_window.slide_key_value_cache)": window
        and window.get("slide_key_value_cache", True),
        "layers are listed by their types (layer_types)": decoder.get("layer_types"),
        "the cache is paged": inputs.get("block_table") or decoder.get("state_groups"),
        "TensorRT-RTX has a profile for each layer's number": "nvtensorrtrtx"
        in json.dumps(options).lower(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _moved(part: Any, kept: Mapping[int, int]) -> Any:
    """A part with its lists of layers numbered anew; None where such a list has become empty.

    To the runtime an empty list would stand for all layers.
    """
    if isinstance(part, list):
        moved = [(item, _moved(item, kept)) for item in part]
        return [new for item, new in moved if item is None or new is not None]
    if not isinstance(part, dict):
        return part
    result = {}
    for key, value in part.items():
        new = value
        if key in _LAYERS and value:
            if not isinstance(value, list) or not all(isinstance(n, int) for n in value):
                raise _unsuitable(CONFIG_FILE, f"the entry {key} is no list of numbers")
            new = [kept[number] for number in value if number in kept]
            if not new:
                return None
        else:
            new = _moved(value, kept)
        if value is None or new is not None:
            result[key] = new
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise _unsuitable(path, f"it is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise _unsuitable(path, "it holds no JSON object")
    return content


def _part(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A part of the config; empty where there is none."""
    part: Any = content
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else {}


def _file_names(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Where in the config a file of the same folder is named, and which."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = ((str(number), part) for number, part in enumerate(content))
    for key, part in items:
        inner = f"{place}.{key}" if place else key
        if key == "filename" and isinstance(part, str):
            yield inner, posixpath.normpath(part)
        else:
            yield from _file_names(part, inner)

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
_NOT_READ = re.compile(r"\.onnx($|\.)|^(prune|genai_config)\.json$|\.md$")
"""Files that the runtime does not look for by themselves."""
_LEAVE_OUT = "Leave the config alone with --genai-config none, and write the new one by hand."
_RENUMBER = "Number the caches that stay from 0: --renumber-kv."


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
        raise SurgeryError(
            f"{path} names {source.name} under {other}; only a model whose decoder is one file "
            f"({_DECODER_FILE}) can be rewritten.",
            _LEAVE_OUT,
            code="several-models",
        )
    config = GenaiConfig(path, content)
    if config.decoder.get("shared_initializers"):
        raise SurgeryError(
            f"{path}: the decoder shares weights with other files "
            "(model.decoder.shared_initializers), which a cut would tear apart.",
            _LEAVE_OUT,
            code="shared-weights",
        )
    return config


def config_target(source: Path, target: Path) -> Path:
    """Where the new config goes: beside the result, under the runtime's name if that is free.

    In the source's own folder that name is the source's; elsewhere another model may have it.
    """
    own, usual = target.with_name(f"{target.name}.{CONFIG_FILE}"), target.with_name(CONFIG_FILE)
    if source.parent.resolve() == target.parent.resolve():
        return own
    names = {name for _, name in _file_names(_read(usual))} if usual.exists() else set()
    taken = target.name not in names and any((usual.parent / name).exists() for name in names)
    return own if taken else usual


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
        numbers = _Layers.read(config, caches, gone, renamed)
        _refuse_gaps(config, numbers)
        _apply(decoder, numbers)
    return json_text(content, indent=4)


def companions(config: GenaiConfig, own: Iterable[Path]) -> list[str]:
    """What else of the config's folder the runtime may need, tokenizer files for one."""
    folder = config.path.parent
    skipped = {path.name for path in own}
    named = {name for _, name in _file_names(config.content)}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name not in skipped and not path.name.startswith(".")
        if path.name in named or not _NOT_READ.search(path.name)
    )


@dataclass(frozen=True)
class _Layers:
    """The layers that keep a state, by old and new number, and those that lost theirs."""

    kept: dict[int, int]
    lost: frozenset[int]

    @classmethod
    def read(
        cls, config: GenaiConfig, caches: Iterable[str], gone: set[str], renamed: Mapping[str, str]
    ) -> _Layers:
        inputs = _DEFAULT_FORMATS | _part(config.decoder, "inputs")
        texts = [text for text in inputs.values() if isinstance(text, str) and _NUMBER in text]
        formats = [re.compile(re.escape(text).replace(_NUMBER, "([0-9]{1,4})")) for text in texts]
        moves = [
            (old, None if name in gone else _number(formats, renamed.get(name, name)))
            for name in caches
            if (old := _number(formats, name)) is not None
        ]
        matched = {name for name in gone if _number(formats, name) is not None}
        if matched != gone:
            raise SurgeryError(
                f"{config.path}: no name in model.decoder.inputs fits the graph's "
                f"{min(gone - matched)}.",
                _LEAVE_OUT,
                code="unnamed-input",
            )
        kept = {old: new for old, new in moves if new is not None}
        return cls(kept, frozenset(old for old, _ in moves) - kept.keys())

    @property
    def dense(self) -> bool:
        return sorted(self.kept.values()) == list(range(len(self.kept)))


def _number(formats: Iterable[re.Pattern[str]], name: str) -> int | None:
    matches = (pattern.fullmatch(name) for pattern in formats)
    return next((int(match[1]) for match in matches if match is not None), None)


def _refuse_gaps(config: GenaiConfig, layers: _Layers) -> None:
    decoder = config.decoder
    if "cross_past_key_names" in _part(decoder, "inputs") and layers.lost:
        raise SurgeryError(
            f"{config.path}: the decoder reads an encoder's keys, of which the runtime expects as "
            "many as the decoder has layers.",
            "Delete only MLPs, or leave the config alone with --genai-config none.",
            code="encoder-keys",
        )
    reason = _needs_dense(config)
    if reason is not None and not layers.dense:
        raise SurgeryError(
            f"{config.path}: {reason}, so the caches need numbers from 0.",
            _RENUMBER,
            code="cache-slides",
        )


def _needs_dense(config: GenaiConfig) -> str | None:
    """Why the runtime would count the caches instead of taking the graph's numbers."""
    decoder = config.decoder
    inputs, window = _part(decoder, "inputs"), _part(decoder, "sliding_window")
    if inputs.get("past_names"):
        return "keys and values are stored together (past_names)"
    if window and window.get("slide_key_value_cache", True):
        return "the cache slides (sliding_window.slide_key_value_cache)"
    if decoder.get("layer_types"):
        return "layers are listed by their types (layer_types)"
    if inputs.get("block_table") or decoder.get("state_groups"):
        return "the cache is paged"
    options = _part(decoder, "session_options").get("provider_options") or []
    if "nvtensorrtrtx" in json.dumps(options).lower():
        return "TensorRT-RTX gets a profile for each layer's number"
    return None


def _apply(decoder: dict[str, Any], layers: _Layers) -> None:
    if isinstance(decoder.get("num_hidden_layers"), int):
        decoder["num_hidden_layers"] -= len(layers.lost)
    if isinstance(types := decoder.get("layer_types"), list):
        decoder["layer_types"] = [t for old, t in enumerate(types) if old not in layers.lost]
    window = decoder.get("sliding_window")
    if isinstance(window, dict) and window.get("layers"):
        window["layers"] = _moved(window["layers"], layers)
        if not window["layers"]:  # an empty list would stand for all layers
            del decoder["sliding_window"]
    groups = decoder.get("state_groups")
    if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):
        moved = [group | {"layer_ids": _moved(group.get("layer_ids"), layers)} for group in groups]
        decoder["state_groups"] = [group for group in moved if group["layer_ids"]]


def _moved(numbers: Any, layers: _Layers) -> list[int]:
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise SurgeryError(
            f"A list of layers in {CONFIG_FILE} is no list of numbers.",
            _LEAVE_OUT,
            code="not-numbers",
        )
    return [layers.kept[number] for number in numbers if number in layers.kept]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise SurgeryError(
            f"{path} is not valid JSON: {error}.", _LEAVE_OUT, code="not-json"
        ) from error
    if not isinstance(content, dict):
        raise SurgeryError(f"{path} holds no JSON object.", _LEAVE_OUT, code="not-an-object")
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

"""A model's folder, looked at before any library sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ModelSourceError, UnsafeModelError, first_line
from exporter.models.families import REVIEWED
from exporter.models.loading.checkpoint_shards import AGAIN, unreadable
from graph_passes.files.reading import (
    CONFIG_BYTES,
    TABLE_BYTES,
    check_file,
    check_folder,
    read_json,
)
from graph_passes.types import MOST_LAYERS

CONFIG = "config.json"
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_CONFIGS = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", *_TOKENIZER_CONFIGS,
)  # fmt: skip
_GENERATE = "custom_generate"
_FOLDERS = ("additional_chat_templates", _GENERATE)
# Read as a whole, unlike weights.
_TEXTS = {".json", ".jinja", ".model", ".py", ".tiktoken", ".spm", ".bpe", ".vocab"}
_CARD = ".md"
_LISTS = {"vocab.txt", "merges.txt", "dict.txt"}  # other texts may be a training's

_COPY = "If you trust the model, take that out of a copy of it."
_ANY_TYPE = "Load it with --allow-any-model-type if you trust the model."
_ITS_CODE = "It brings its own code; allow that with --trust-remote-code if you trust it."
# transformers hands these on to functions that load a second model, run code or read another file.
_HANDED_ON = {
    "trust_remote_code": "lets code run that nobody here allowed",
    "backbone_kwargs": "goes to the loading of another model",
    "use_timm_backbone": "loads another model by its name",
    "use_pretrained_backbone": "loads another model by its name",
    "configuration_files": "names other configs, which are read in place of this one",
    _GENERATE: "names code for generating",
    "init_inputs": "gives a tokenizer's class arguments by their order, files among them",
    "gguf_file": "names a file to read in place of this one",
}
# A hub's kernel is named owner/name, and is code.
_PLAIN_NAME = re.compile(r"[\w|-]*")
# A module of the folder and a class; another repository's begins with its name and "--".
_OWN_CODE = re.compile(r"\w+(-\w+)*\.\w+")
_IMPLEMENTATION = "implementation"  # 4.57 keeps it in _attn_implementation_internal
# What a tokenizer opens; a bare name it looks for in the working directory, not in the folder.
_FILES = {"vocab", "merges", "source_spm", "target_spm"}
_NEVER_OPENED = {"special_tokens_map_file", "added_tokens_file"}  # old versions noted their cache
_PROGRAMS = {"mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs"}

_NUMBER = re.compile(r"^(num|n)_|_(eps|epsilon|size|dim|dropout|theta|range)$")
_COUNTED = re.compile("^(?!.*_size).*(layer|block|expert|depth|stage)")
_MOST = 10_000
_MOST_ENTRIES = 1 << 16


@dataclass(frozen=True)
class Dangers:
    """What a model may do that others may not: off by default, set by the caller alone."""

    trust_remote_code: bool = False
    allow_pickle: bool = False
    allow_any_model_type: bool = False


def checked_config(folder: Path, dangers: Dangers) -> dict[str, Any]:
    """Looks at a model's folder, and gives what its ``config.json`` says."""
    for name in _FOLDERS:
        check_folder(folder / name, folder)
    for path in _files(folder):  # whatever a library could open
        whole = path.suffix in _TEXTS or path.stem == "vocab" or path.name in _LISTS
        check_file(path, folder, limit=TABLE_BYTES if whole else None)
    present = {
        "adapter_config.json": "an adapter, which is loaded with the model that it names",
        # transformers 4.57 runs what is in there without asking.
        **({} if dangers.trust_remote_code else {_GENERATE: "code for generating"}),
    }
    for name, what in present.items():
        if (folder / name).exists():
            raise UnsafeModelError(f"{folder} holds {name}: {what}.", _COPY)
    config = read_object(folder / CONFIG)
    for path in (folder / name for name in _CONFIGS):
        if path.name == CONFIG or path.exists():
            content = config if path.name == CONFIG else read_object(path)
            refuse_entries(content, path, dangers, of_model=path.name == CONFIG)
    return config


def refuse_entries(content: Any, path: Path, dangers: Dangers, *, of_model: bool = True) -> None:
    """Refuses what makes transformers load, fetch or run something else, or never end."""
    brings = "auto_map" in content
    any_type = dangers.allow_any_model_type or (dangers.trust_remote_code and brings)
    kind: type[ModelSourceError]
    for where, key, value in _entries(content):
        hint, kind = _COPY, UnsafeModelError
        why = _danger(key, value, path.name in _TOKENIZER_CONFIGS, dangers)
        most = MOST_LAYERS if key.endswith(("layer", "layers")) else _MOST
        if isinstance(value, list) and len(value) > _MOST_ENTRIES:
            why, hint = f"is longer than {_MOST_ENTRIES}", AGAIN
        elif isinstance(value, int) and value > most and _COUNTED.search(key):
            why, hint = f"is larger than {most}, which no model has", AGAIN
        elif of_model and key == "model_type" and not any_type and not _is_reviewed(value):
            why = f"is {str(value)[:60]!r}, a type whose code was not looked at for depthcut"
            hint = _ITS_CODE if brings else _ANY_TYPE
        # transformers 4.57 takes it, and fails when it runs.
        elif of_model and isinstance(value, str) and _NUMBER.search(key):
            why, hint, kind = f"is {value[:60]!r}, and no number", AGAIN, ModelSourceError
        if why:
            raise kind(f"{path}: $.{where} {why}.", hint)


def _is_reviewed(model_type: Any) -> bool:
    return model_type is None or (isinstance(model_type, str) and model_type in REVIEWED)


def _danger(key: str, value: Any, of_tokenizer: bool, dangers: Dangers) -> str:
    """Why an entry isn't taken; empty where it is."""
    if key in _HANDED_ON and value:
        return _HANDED_ON[key]
    if key == "backbone" and isinstance(value, str):
        return "loads another model by its name"
    if _IMPLEMENTATION in key and not all(map(_PLAIN_NAME.fullmatch, _texts(value))):
        return "names code that would be fetched and run"
    named = key in _FILES or (key.endswith("_file") and key not in _NEVER_OPENED)
    named = (named and isinstance(value, str) and bool(value)) or (key in _PROGRAMS and bool(value))
    named |= key == "fast_tokenizer_files" and any(Path(n).name != n for n in _texts(value))
    if of_tokenizer and named:  # its files are found by their usual names
        return "names a file to open, which may lie anywhere"
    # transformers 4.57 takes any path for it.
    if key == "transformers_weights" and value is not None and Path(str(value)).name != value:
        return "is no name of a file in the model's folder"
    foreign = key == "auto_map" and not all(map(_OWN_CODE.fullmatch, _texts(value)))
    if dangers.trust_remote_code and foreign:
        return "names code that is not the folder's own, nor part of the model's hash"
    return ""


def quantization_in(content: Any) -> Any:
    """What a config says of how its weights, or those of a model inside it, are quantized."""
    values = (value for _, key, value in _entries(content) if key == "quantization_config")
    return next((value for value in values if value), None)


def _entries(content: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every entry of every object: its place, its key and its value."""
    if isinstance(content, list):
        for number, part in enumerate(content):
            yield from _entries(part, f"{place}[{number}]")
    elif isinstance(content, dict):
        for key, value in content.items():
            where = f"{place}.{key}" if place else str(key)
            yield where, key, value
            yield from _entries(value, where)


def _texts(value: Any) -> Iterator[str]:
    """A text, or the texts in a list or object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def files_as_they_are(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes of a folder's files when one is written or replaced, by their names."""
    numbers: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        if path.exists():
            status = path.stat()
            numbers[str(path)] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return numbers


def refuse_changed(folder: Path, before: dict[str, tuple[int, ...]]) -> None:
    """Refuses a folder that was written to while it was read."""
    now = files_as_they_are(folder)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        raise UnsafeModelError(
            f"{changed[0]} was changed while the model was loaded.",
            "Load it again once whatever writes there is done.",
            code="file-changed",
        )


def _files(folder: Path) -> list[Path]:
    """All files at the top and in folders that libraries look into, but for cards."""
    paths = []
    for place in (folder, *(folder / name for name in _FOLDERS)):
        if place.is_dir():
            paths += [path for path in place.iterdir() if not path.is_dir()]
    return sorted(path for path in paths if path.suffix != _CARD)


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object of a model's folder."""
    try:
        content = read_json(path, limit=limit)
    except (OSError, ValueError) as error:
        raise unreadable(f"{path} can't be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise unreadable(f"{path} is not a JSON object")
    return content
